/* SPDX-License-Identifier: Apache-2.0
 *
 * The part of quire.h about sequences, their blocks, and where these go beyond the pool.
 */
#ifndef QUIRE_QUIRE_KV_H_
#define QUIRE_QUIRE_KV_H_

#ifndef QUIRE_QUIRE_H_
#error "include quire/quire.h, which includes this"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Sequences and their blocks (kv_cache_manager.h) */

typedef struct QuireKVCacheManager QuireKVCacheManager;

/* A handle that is refused once its sequence was freed. */
typedef struct QuireSequenceId {
  int64_t value;
} QuireSequenceId;

/* Sequences of different salts share nothing; a NULL salt is one of its own. */
typedef struct QuirePrompt {
  size_t struct_size;
  const int32_t* token_ids;
  size_t num_tokens;
  const char* salt;
  size_t salt_size;
  double ttl;       /* seconds that unused blocks keep their priority; below 0: no limit */
  int32_t priority; /* 0 to 100: cached blocks of lower ones are evicted first */
  int32_t reserved; /* 0 */
} QuirePrompt;
#define QUIRE_PROMPT_INIT {sizeof(QuirePrompt), NULL, 0, NULL, 0, -1, 0, 0}

typedef enum QuireEviction {
  QUIRE_LRU = 0,
  QUIRE_REUSE_LRU = 1 /* by classes of reuse (eviction_policy.h) */
} QuireEviction;

typedef enum QuireLayerGroupKind {
  QUIRE_FULL = 0,           /* every token before */
  QUIRE_SLIDING_WINDOW = 1, /* the last `size` tokens */
  QUIRE_CHUNKED_LOCAL = 2,  /* tokens from the last multiple of `size` on */
  QUIRE_STATE = 3           /* one block that sums up all tokens before */
} QuireLayerGroupKind;

/* What some layers read (layer_groups.h). This struct never changes. */
typedef struct QuireLayerGroup {
  int32_t kind; /* QuireLayerGroupKind */
  int32_t size; /* tokens; of windows and chunks only */
} QuireLayerGroup;

typedef struct QuireKVCacheConfig {
  size_t struct_size;
  int32_t num_blocks;
  int32_t block_size;
  int32_t prefix_caching;
  int32_t async_depth;     /* steps that may run while the host plans on; each is to be retired */
  int32_t eviction;        /* QuireEviction */
  int32_t event_capacity;  /* events kept for take_events(); 0: none are made */
  int32_t num_host_blocks; /* for swap_out() */
  int32_t num_groups;      /* 0: one, of full attention */
  const QuireLayerGroup* groups; /* [num_groups], the first of them full */
} QuireKVCacheConfig;
#define QUIRE_KV_CACHE_CONFIG_INIT \
  {sizeof(QuireKVCacheConfig), 0, 16, 1, 0, QUIRE_LRU, 0, 0, 0, NULL}

/* The arrays of a step, valid until the next one (step_batch.h). */
typedef struct QuireStepBatch {
  size_t struct_size;
  int64_t ticket;
  int32_t batch_size;
  int32_t max_blocks;
  int64_t block_table_stride;
  const int32_t* block_table;  /* [batch, max_blocks] */
  const int32_t* seq_lens;     /* [batch] */
  const int32_t* cu_seqlens_q; /* [batch + 1] */
  const int64_t* slot_mapping; /* [total_q]; NULL of a state group */
  const int32_t* positions;    /* [total_q] */
  const int32_t* copies;       /* [num_copies, 2]: for copy_blocks, before any KV is written */
  int64_t total_q;
  int64_t num_copies;
  const int32_t* changes; /* [num_changes, 2]: written entries of block_table (index, block id) */
  int64_t num_changes;
  int32_t lookahead; /* given: tokens behind the new ones that block_table is to reach */
  int32_t reserved;  /* 0 */
} QuireStepBatch;
#define QUIRE_STEP_BATCH_INIT \
  {sizeof(QuireStepBatch), 0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, 0, 0, 0}

typedef struct QuireSequenceInfo {
  size_t struct_size;
  int64_t num_tokens;          /* known */
  int64_t num_computed_tokens; /* whose KV is written */
  int64_t num_cached_tokens;   /* found in the prefix cache by create() */
} QuireSequenceInfo;
#define QUIRE_SEQUENCE_INFO_INIT {sizeof(QuireSequenceInfo), 0, 0, 0}

typedef struct QuireKVCacheStats {
  size_t struct_size;
  int32_t num_blocks, block_size;
  int32_t free_blocks, used_blocks, cached_blocks;
  int32_t high_water_blocks;
  int64_t deferred_refs;
  int64_t used_tokens, waste_tokens;
  int64_t prefix_query_tokens, prefix_hit_tokens;
  int64_t evicted_blocks;
  int32_t pinned_blocks, fenced_blocks;
  int64_t lost_events;
  int64_t host_hit_tokens, file_hit_tokens; /* fetched from stores */
  int32_t num_host_blocks, swapped_blocks;
} QuireKVCacheStats;
#define QUIRE_KV_CACHE_STATS_INIT \
  {sizeof(QuireKVCacheStats), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

QuireStatus quire_kv_cache_manager_new(const QuireKVCacheConfig* config,
                                       QuireKVCacheManager** manager);
void quire_kv_cache_manager_delete(QuireKVCacheManager* manager);
QuireStatus quire_kv_cache_manager_create(QuireKVCacheManager* manager, const QuirePrompt* prompt,
                                          QuireSequenceId* seq);
QuireStatus quire_kv_cache_manager_free(QuireKVCacheManager* manager, const QuireSequenceId* seqs,
                                        size_t num_seqs);
/* QUIRE_OUT_OF_BLOCKS: nothing has changed, `batch` included. */
QuireStatus quire_kv_cache_manager_step(QuireKVCacheManager* manager, const QuireSequenceId* seqs,
                                        const int32_t* num_new_tokens, size_t num_seqs,
                                        QuireStepBatch* batch);
/* sampled NULL: no new tokens; num_sampled NULL: one of each sequence. */
QuireStatus quire_kv_cache_manager_commit(QuireKVCacheManager* manager, const QuireSequenceId* seqs,
                                          size_t num_seqs, const int32_t* sampled,
                                          const int32_t* num_sampled);
QuireStatus quire_kv_cache_manager_fork(QuireKVCacheManager* manager, QuireSequenceId seq,
                                        QuireSequenceId* child);
QuireStatus quire_kv_cache_manager_fork_many(QuireKVCacheManager* manager, QuireSequenceId seq,
                                             QuireSequenceId* children, size_t num_children);
QuireStatus quire_kv_cache_manager_truncate(QuireKVCacheManager* manager, QuireSequenceId seq,
                                            int64_t num_tokens);
QuireStatus quire_kv_cache_manager_retire(QuireKVCacheManager* manager, int64_t ticket);
QuireStatus quire_kv_cache_manager_match(const QuireKVCacheManager* manager,
                                         const QuirePrompt* prompt, int64_t* num_tokens);
/* The cached whole blocks of a prompt stay until unpin, which takes the longest pin in it back. */
QuireStatus quire_kv_cache_manager_pin(QuireKVCacheManager* manager, const QuirePrompt* prompt,
                                       int64_t* num_tokens);
QuireStatus quire_kv_cache_manager_unpin(QuireKVCacheManager* manager, const QuirePrompt* prompt,
                                         int64_t* num_tokens);
/* The same, of a sequence's computed tokens. */
QuireStatus quire_kv_cache_manager_pin_sequence(QuireKVCacheManager* manager, QuireSequenceId seq,
                                                int64_t* num_tokens);
QuireStatus quire_kv_cache_manager_unpin_sequence(QuireKVCacheManager* manager, QuireSequenceId seq,
                                                  int64_t* num_tokens);
QuireStatus quire_kv_cache_manager_sequence(const QuireKVCacheManager* manager, QuireSequenceId seq,
                                            QuireSequenceInfo* info);
QuireStatus quire_kv_cache_manager_block_table(const QuireKVCacheManager* manager,
                                               QuireSequenceId seq, int32_t* buffer, size_t* size);
QuireStatus quire_kv_cache_manager_token_ids(const QuireKVCacheManager* manager,
                                             QuireSequenceId seq, int32_t* buffer, size_t* size);
QuireStatus quire_kv_cache_manager_stats(const QuireKVCacheManager* manager,
                                         QuireKVCacheStats* stats);
QuireStatus quire_kv_cache_manager_validate(const QuireKVCacheManager* manager);

/* ---- Layer groups (layer_groups.h) */

typedef struct QuireLayerGroupStats { /* This struct never changes. */
  int32_t used_blocks, cached_blocks;
} QuireLayerGroupStats;

QuireStatus quire_kv_cache_manager_groups(const QuireKVCacheManager* manager,
                                          QuireLayerGroup* buffer, size_t* size);
QuireStatus quire_kv_cache_manager_group_stats(const QuireKVCacheManager* manager,
                                               QuireLayerGroupStats* buffer, size_t* size);
/* The latest step as a group sees it, lookahead apart. */
QuireStatus quire_kv_cache_manager_group_batch(const QuireKVCacheManager* manager, int32_t group,
                                               QuireStepBatch* batch);
/* -1: given back, the group reads it no more. */
QuireStatus quire_kv_cache_manager_group_block_table(const QuireKVCacheManager* manager,
                                                     QuireSequenceId seq, int32_t group,
                                                     int32_t* buffer, size_t* size);

/* ---- For schedulers of your own */

typedef struct QuireKVCacheInfo {
  size_t struct_size;
  int64_t num_bytes; /* of all arrays whose size depends on num_blocks */
  int32_t num_groups, num_sequences;
  int32_t prefix_caching, caches_states;
} QuireKVCacheInfo;
#define QUIRE_KV_CACHE_INFO_INIT {sizeof(QuireKVCacheInfo), 0, 0, 0, 0, 0}

typedef struct QuirePrefixMatch {
  size_t struct_size;
  int64_t num_tokens;
  int32_t num_idle_blocks, num_blocks; /* whole ones, and those of them that nobody uses */
} QuirePrefixMatch;
#define QUIRE_PREFIX_MATCH_INIT {sizeof(QuirePrefixMatch), 0, 0, 0}

/* Until unlock(), other threads' calls wait. A thread may lock several times. */
QuireStatus quire_kv_cache_manager_lock(QuireKVCacheManager* manager);
QuireStatus quire_kv_cache_manager_unlock(QuireKVCacheManager* manager);
QuireStatus quire_kv_cache_manager_info(const QuireKVCacheManager* manager, QuireKVCacheInfo* info);
QuireStatus quire_kv_cache_manager_may_step(const QuireKVCacheManager* manager, int32_t* may_step);
/* create() is open() and attach(); detach() gives all blocks back and keeps the tokens. */
QuireStatus quire_kv_cache_manager_open(QuireKVCacheManager* manager, const QuirePrompt* prompt,
                                        QuireSequenceId* seq);
QuireStatus quire_kv_cache_manager_attach(QuireKVCacheManager* manager, QuireSequenceId seq);
QuireStatus quire_kv_cache_manager_detach(QuireKVCacheManager* manager, QuireSequenceId seq);
QuireStatus quire_kv_cache_manager_match_sequence(const QuireKVCacheManager* manager,
                                                  QuireSequenceId seq, QuirePrefixMatch* match);
QuireStatus quire_kv_cache_manager_sequences(const QuireKVCacheManager* manager,
                                             QuireSequenceId* buffer, size_t* size);
/* Tokens that are known and not computed. */
QuireStatus quire_kv_cache_manager_pending_tokens(const QuireKVCacheManager* manager,
                                                  QuireSequenceId seq, int32_t* buffer,
                                                  size_t* size);
QuireStatus quire_kv_cache_manager_shareable_tokens(const QuireKVCacheManager* manager,
                                                    QuireSequenceId a, QuireSequenceId b,
                                                    int64_t* num_tokens);
/* Blocks to compute a sequence's first num_tokens tokens, at most max_step a step. */
QuireStatus quire_kv_cache_manager_num_missing_blocks(const QuireKVCacheManager* manager,
                                                      QuireSequenceId seq, int64_t num_tokens,
                                                      int64_t max_step, int32_t* num_blocks);
QuireStatus quire_kv_cache_manager_num_blocks_for(const QuireKVCacheManager* manager,
                                                  int64_t num_tokens, int64_t max_step,
                                                  int64_t* num_blocks);

/* ---- Stores behind the pool (kv_store.h) */

/* The name of a block's contents and of all before it (chain_key.h). This struct never changes. */
typedef struct QuireChainKey {
  uint8_t bytes[32];
} QuireChainKey;

typedef enum QuireCacheTier {
  QUIRE_TIER_DEVICE = 0,
  QUIRE_TIER_HOST = 1,
  QUIRE_TIER_FILE = 2
} QuireCacheTier;

typedef enum QuireKVOutcome {
  QUIRE_KV_PENDING = 0,
  QUIRE_KV_DONE = 1,
  QUIRE_KV_MISSING = 2, /* of a get: the buffer may hold anything */
  QUIRE_KV_FAILED = 3   /* of a put: not stored */
} QuireKVOutcome;

typedef struct QuireKVStore QuireKVStore;   /* to be deleted after the managers it is attached to */
typedef struct QuireKVTicket QuireKVTicket; /* a request; deleting it does not undo the request */

/* path NULL: blocks in host memory; else one file a block in this directory. */
typedef struct QuireKVStoreConfig {
  size_t struct_size;
  int64_t capacity_bytes;
  int64_t block_bytes;
  const char* path;
  const char* identity; /* of files: what the bytes mean, ends with 0; NULL: "" */
  int32_t max_pending;  /* gets, and as many puts, that may wait */
  int32_t reserved;     /* 0 */
} QuireKVStoreConfig;
#define QUIRE_KV_STORE_CONFIG_INIT {sizeof(QuireKVStoreConfig), 0, 0, NULL, NULL, 64, 0}

typedef struct QuireKVStoreStats {
  size_t struct_size;
  int64_t num_blocks, capacity_blocks;
  int64_t num_pending;
  int64_t stored, hits, misses, evicted, not_taken, failed, dropped;
} QuireKVStoreStats;
#define QUIRE_KV_STORE_STATS_INIT {sizeof(QuireKVStoreStats), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

/* salt NULL: none. */
QuireStatus quire_root_key(const char* salt, size_t salt_size, QuireChainKey* key);
/* Of the whole blocks of tokens behind `parent`; a last, partial block has no key. */
QuireStatus quire_chain_keys(const QuireChainKey* parent, const int32_t* token_ids,
                             size_t num_tokens, int32_t block_size, QuireChainKey* buffer,
                             size_t* size);

QuireStatus quire_kv_store_new(const QuireKVStoreConfig* config, QuireKVStore** store);
void quire_kv_store_delete(QuireKVStore* store); /* completes what was taken */
/* payload_size: block_bytes. The memory must stay until the request has completed. A ticket that is
 * NULL afterwards: the queue is full, the request was not taken. */
QuireStatus quire_kv_store_put(QuireKVStore* store, const QuireChainKey* key, const void* payload,
                               size_t payload_size, QuireKVTicket** ticket);
QuireStatus quire_kv_store_get(QuireKVStore* store, const QuireChainKey* key, void* payload,
                               size_t payload_size, QuireKVTicket** ticket);
QuireStatus quire_kv_store_contains(const QuireKVStore* store, const QuireChainKey* key,
                                    int32_t* contains);
QuireStatus quire_kv_store_erase(QuireKVStore* store, const QuireChainKey* key, int32_t* erased);
QuireStatus quire_kv_store_drain(QuireKVStore* store); /* waits for every request taken so far */
QuireStatus quire_kv_store_stats(const QuireKVStore* store, QuireKVStoreStats* stats);
QuireStatus quire_kv_ticket_outcome(const QuireKVTicket* ticket, int32_t* outcome);
QuireStatus quire_kv_ticket_wait(const QuireKVTicket* ticket, int32_t* outcome);
void quire_kv_ticket_delete(QuireKVTicket* ticket);

/* ---- What leaves the pool and comes back: the copies are the caller's, in the order of the calls,
 * each before any KV of a later step is written */

/* These structs never change. */
typedef struct QuireKVTransfer {
  int32_t block;
  int32_t tier; /* QuireCacheTier of the store */
  QuireChainKey key;
} QuireKVTransfer;

typedef struct QuireBlockPair {
  int32_t source, destination;
} QuireBlockPair;

typedef enum QuireCacheEventKind {
  QUIRE_EVENT_STORED = 0,
  QUIRE_EVENT_REMOVED = 1,
  QUIRE_EVENT_EVICTED = 2,
  QUIRE_EVENT_SWAPPED = 3
} QuireCacheEventKind;

typedef struct QuireCacheEvent { /* event_log.h */
  int64_t sequence;              /* a gap: events were lost */
  int32_t kind;                  /* QuireCacheEventKind */
  int32_t tier;                  /* QuireCacheTier */
  int32_t block;                 /* or -1 */
  int32_t reserved;
  QuireChainKey key, parent;
} QuireCacheEvent;

QuireStatus quire_kv_cache_manager_attach_store(QuireKVCacheManager* manager,
                                                const QuireKVStore* store);
/* What the latest step(), schedule(), fetch() or swap_in() evicted; valid until the next call of
 * this. */
QuireStatus quire_kv_cache_manager_take_offloads(QuireKVCacheManager* manager,
                                                 const QuireKVTransfer** transfers,
                                                 size_t* num_transfers);
/* *size: at most. The transfers are to be got from stores, then fetched() says how many came. */
QuireStatus quire_kv_cache_manager_fetch(QuireKVCacheManager* manager, QuireSequenceId seq,
                                         QuireKVTransfer* buffer, size_t* size);
QuireStatus quire_kv_cache_manager_fetched(QuireKVCacheManager* manager, QuireSequenceId seq,
                                           int32_t num_blocks);
/* *size: at most. Blocks of the pool and host blocks, in the direction of the copies. */
QuireStatus quire_kv_cache_manager_swap_out(QuireKVCacheManager* manager, QuireSequenceId seq,
                                            QuireBlockPair* buffer, size_t* size);
QuireStatus quire_kv_cache_manager_swap_in(QuireKVCacheManager* manager, QuireSequenceId seq,
                                           QuireBlockPair* buffer, size_t* size);
QuireStatus quire_kv_cache_manager_is_swapped_out(const QuireKVCacheManager* manager,
                                                  QuireSequenceId seq, int32_t* is_swapped_out);
/* Gives up what is cached and nobody uses; events say removed. */
QuireStatus quire_kv_cache_manager_clear_cache(QuireKVCacheManager* manager, int32_t* num_blocks);
/* Takes the oldest events that the buffer holds; the others stay. */
QuireStatus quire_kv_cache_manager_take_events(QuireKVCacheManager* manager,
                                               QuireCacheEvent* buffer, size_t* size);
QuireStatus quire_kv_cache_manager_cached_blocks(const QuireKVCacheManager* manager,
                                                 int32_t* buffer, size_t* size);
/* JSON without a final 0; all but stores and events. */
QuireStatus quire_kv_cache_manager_snapshot(const QuireKVCacheManager* manager, char* buffer,
                                            size_t* size);
QuireStatus quire_kv_cache_manager_restore(const char* snapshot, size_t size,
                                           QuireKVCacheManager** manager);

#ifdef __cplusplus
}
#endif

#endif /* QUIRE_QUIRE_KV_H_ */
