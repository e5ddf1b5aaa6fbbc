// SPDX-License-Identifier: Apache-2.0
// Steps and commits of a batch that decodes on as it is: the loop.
#include <algorithm>
#include <cstring>

#include "packed_tokens.h"
#include "quire/kv_cache_manager.h"
#include "reserve_more.h"

namespace quire {

// Whether a call names the sequences of the loop, in order.
bool KVCacheManager::continues_loop(std::span<const SequenceId> seqs) const {
  return !seqs.empty() && seqs.size() == loop_seqs_.size() &&
         std::memcmp(seqs.data(), loop_seqs_.data(), seqs.size_bytes()) == 0;
}

// After a step of one token each of loop_seqs_, none of which has another known token.
void KVCacheManager::begin_loop(std::span<const SequenceId> seqs) {
  for (const Sequence* seq : visited_) {
    // A lookahead may have left blocks, which come first.
    if (seq->table.size() != seq->table.blocks_for(seq->num_tokens())) return;
    const int64_t begin = block_size_.index(seq->num_computed) * block_size_;
    if (!fits_packed(seq->tokens_from(begin), static_cast<int32_t>(seq->num_tokens() - begin)))
      return;  // commit() asks for the memory that such tokens take
  }
  loop_seqs_.assign(seqs.begin(), seqs.end());
  loop_.begin({batch_.positions().data(), batch_.positions().size()}, block_size_);
  loop_stepped_ = true;
  for (size_t i = 0; i < visited_.size(); ++i) visited_[i]->row = static_cast<int32_t>(i);
}

// Whether the rows that begin a block have a column left for it.
bool KVCacheManager::fits_loop() const {
  const auto [first, last] = loop_.beginning();
  int32_t most = 0;
  for (int32_t rank = first; rank < last; ++rank) most = std::max(most, loop_.num_blocks(rank));
  return most < batch_.block_table_stride();
}

// Asks for the memory of sequences that lie far apart before any of it is needed.
void KVCacheManager::prefetch_rows(int32_t first_rank, int32_t last_rank, int32_t step) const {
  for (int32_t rank = first_rank; rank < last_rank; rank += step) {
    const Sequence* seq = &sequences_[loop_seqs_[loop_.row(rank)].index()];
    __builtin_prefetch(seq, 1);
    __builtin_prefetch(&seq->was_attached, 1);
  }
  for (int32_t rank = first_rank; rank < last_rank; rank += step) {
    const Sequence& seq = sequences_[loop_seqs_[loop_.row(rank)].index()];
    __builtin_prefetch(seq.tokens.data() + seq.tokens.size(), 1);
    seq.table.prefetch_end();
  }
}

const StepBatch* KVCacheManager::step_loop() {
  const auto [first, last] = loop_.beginning();
  batch_.reserve_changes(2 * static_cast<size_t>(last - first));
  if (!allocate(last - first)) return nullptr;
  for (int32_t rank = first; rank < last; ++rank)
    batch_.prefetch(loop_.row(rank), loop_.num_blocks(rank));
  batch_.advance(++last_ticket_);
  auto replaced = replaced_ranks_.begin();
  for (int32_t rank = first; rank < last; ++rank) {
    const int32_t row = loop_.row(rank), column = loop_.num_blocks(rank);
    const int32_t block = new_blocks_[rank - first];
    if (replaced != replaced_ranks_.end() && *replaced == rank) {
      batch_.replace_block(row, column - 1, loop_.parent(rank));
      sequence_of(loop_seqs_[row]).table.note_written();
      ++replaced;
    }
    batch_.begin_block(row, column, block, int64_t{block} * block_size_);
    loop_.begin_block(rank, block);
  }
  replaced_ranks_.clear();
  loop_stepped_ = true;
  return &batch_;
}

void KVCacheManager::commit_loop(std::span<const int32_t> sampled) {
  const auto [first, last] = loop_.filling();
  replaced_ranks_.reserve(static_cast<size_t>(last - first));
  reserve_releases(last - first);
  if (loop_.fills_first())
    fill_first_blocks(first, last);
  else
    fill_blocks(first, last);
  loop_.commit(sampled);
  loop_stepped_ = false;
}

void KVCacheManager::fill_first_blocks(int32_t first_rank, int32_t last_rank) {
  prefetch_rows(first_rank, last_rank, 1);
  for (int32_t rank = first_rank; rank < last_rank; ++rank)
    reserve_more(sequence_of(loop_seqs_[loop_.row(rank)]).tokens, block_size_);
  for (int32_t rank = first_rank; rank < last_rank; ++rank) {
    Sequence& seq = sequence_of(loop_seqs_[loop_.row(rank)]);
    loop_.drain_first(rank, &seq.tokens);
    const int32_t index = seq.table.size() - 1;  // the loop has no blocks ahead
    const int32_t block = seq.table[index];
    const int32_t kept = cache_ ? publish(seq, index) : block;
    loop_.set_filled(rank, kept);
    if (kept != block) replaced_ranks_.push_back(rank);
  }
}

void KVCacheManager::fill_blocks(int32_t first_rank, int32_t last_rank) {
  const int32_t first_due = loop_.next_due(first_rank);
  prefetch_rows(first_due, last_rank, loop_.num_kept());
  for (int32_t rank = first_due; rank < last_rank; rank += loop_.num_kept()) {
    Sequence& seq = sequence_of(loop_seqs_[loop_.row(rank)]);
    reserve_more(seq.tokens, static_cast<size_t>(loop_.num_kept()) * block_size_);
    seq.table.reserve_more(loop_.num_kept());
  }
  for (int32_t rank = first_rank; cache_ && rank < last_rank; ++rank) {
    cache_->prefetch(loop_.block(rank));
    cache_->prefetch_node(loop_.parent(rank));
    allocator_.prefetch(loop_.block(rank));
  }
  loop_.gather();
  for (int32_t rank = first_rank; rank < last_rank; ++rank) {
    const int32_t block = loop_.block(rank);
    const int32_t kept =
        cache_ ? publish(loop_.parent(rank), loop_.filling_tokens(rank), block) : block;
    loop_.set_filled(rank, kept);
    if (kept != block) replaced_ranks_.push_back(rank);
  }
  for (int32_t rank = first_due; rank < last_rank; rank += loop_.num_kept()) {
    Sequence& seq = sequence_of(loop_seqs_[loop_.row(rank)]);
    loop_.drain(rank, is_replaced(rank), &seq.table, &seq.tokens);
  }
}

// Whether the batch does not have the latest full block of a row yet.
bool KVCacheManager::is_replaced(int32_t rank) const {
  return std::binary_search(replaced_ranks_.begin(), replaced_ranks_.end(), rank);
}

// Leaves the loop, if it runs: its sequences get their tokens, blocks and counts.
void KVCacheManager::settle() {
  for (int32_t rank = 0; rank < loop_.size(); ++rank) {
    Sequence& seq = sequence_of(loop_seqs_[loop_.row(rank)]);
    reserve_more(seq.tokens, static_cast<size_t>(num_computed(seq) + 1 - seq.num_tokens()));
    seq.table.reserve_more(loop_.num_blocks(rank) - seq.table.size());
  }
  for (int32_t rank = 0; rank < loop_.size(); ++rank) {
    Sequence& seq = sequence_of(loop_seqs_[loop_.row(rank)]);
    loop_.drain_at_end(rank, is_replaced(rank), &seq.table, &seq.tokens);
    seq.num_computed = num_computed(seq);
    seq.num_planned = loop_stepped_;
    seq.row = -1;
  }
  loop_.end();
  loop_seqs_.clear();
  replaced_ranks_.clear();
}

}  // namespace quire
