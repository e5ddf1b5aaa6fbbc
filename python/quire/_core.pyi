"""Bindings of the quire runtime; use the package `quire`."""

from collections.abc import Sequence as _Sequence
from typing import Any, Literal, overload

import numpy
import numpy.typing

import quire._stats


def cpu_isa() -> str:
    """
    Instruction set of the CPU kernels in use: "scalar", "avx2", ...

    QUIRE_CPU_ISA forces one; ValueError if that one is unknown or unsupported here.

    Example::

        >>> quire.cpu_isa() in quire.supported_cpu_isas()
        True
    """

def supported_cpu_isas() -> list[str]:
    """
    Instruction sets that this CPU can run, best first.

    Example::

        >>> quire.supported_cpu_isas()[-1]
        'scalar'
    """

def num_threads() -> int:
    """
    Threads that CPU kernels run on, the caller's included.

    By default the CPUs that the process may use, or QUIRE_NUM_THREADS.

    Example::

        >>> quire.num_threads() >= 1
        True
    """

def set_num_threads(count: int) -> None:
    """
    Sets the number of CPU threads; results do not change by a bit.

    Raises ValueError for count < 1.

    Example::

        >>> quire.set_num_threads(2)
    """

def cuda_state() -> str:
    """
    One sentence on CUDA: "built without CUDA", "no driver", ...

    Example::

        >>> print(quire.cuda_state())
    """

def multiply_add_rate(bfloat16_pairs: bool) -> float: ...

def read_rate(data: object) -> float: ...

def capabilities() -> list[dict[str, Any]]:
    """
    What works, a dict a row: device, isa, dtype, kv_dtype, head_dim (least, most), features, available (on this machine).

    Whatever a row lists works; what no row lists is refused with NotImplementedError.

    Example::

        >>> any(row["available"] for row in quire.capabilities())
        True
    """

class AttentionPlan:
    """
    One step's list of work, made by Attention.plan(). Immutable: it serves every layer of the step, from any thread.

    Its figures are 0 where the GPU has made it: only the GPU knows them.
    """

    @property
    def num_work_items(self) -> int:
        """
        Work items: some rows of a sequence, for one kv head, against a range of its keys.
        """

    @property
    def num_shared_items(self) -> int:
        """
        Those whose keys are read once for several sequences: blocks that begin the block
        tables of all of them. The result is the same, bit by bit.
        """

    @property
    def flops(self) -> int:
        """
        Floating-point operations of one layer: q.k and p.v over all visible pairs.
        """

    @property
    def kv_bytes(self) -> int:
        """
        Bytes of K and V that one layer reads, counted once a sequence and kv head.
        """

class Attention:
    """
    Attention of one model over a paged cache: plan once a step, run once a layer.

    Picks the kernel when built. `window` is (left, right), inclusive, -1 = open; `scale` None
    is 1/sqrt(head_dim); `softcap` 0 is none; `kv_dtype` None is `dtype`, else "float8_e4m3",
    "float8_e5m2" or "int8" for a quantised cache. `dtype` "float8_e4m3" is for queries of
    codes over a cache of such: see paged_attention(). `head_dim_v`, the width of values, None
    is head_dim: 512 for latent caches (MLA) of 576, v_cache = k_cache[..., :512]. Thread-safe.

    Raises ValueError for a wrong argument, NotImplementedError (with the text of explain())
    where no kernel fits.

    Example::

        attn = quire.Attention(num_heads=32, num_kv_heads=8, head_dim=128, dtype="float32")
        plan = attn.plan(block_table, seq_lens)          # once a step
        attn.run(plan, q, k_cache, v_cache, out=out)     # once a layer
    """

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str = 'bfloat16', kv_dtype: str | None = None, block_size: int = 16, causal: bool = True, window: tuple[int, int] = (-1, -1), softcap: float = 0.0, scale: float | None = None, device: str = 'cpu', head_dim_v: int | None = None) -> None: ...

    def plan(self, block_table: object, seq_lens: object, cu_seqlens_q: object | None = None, max_total_q: int | None = None, stream: object | None = None) -> AttentionPlan:
        """
        Plans one step of a batch.

        block_table int32 [batch, max_blocks], seq_lens int32 [batch] (the new tokens
        included), cu_seqlens_q int32 [batch + 1] or None for one query row each. The plan
        copies what it needs: the arrays may change afterwards. An Attention that differs in
        scale or softcap alone runs it, too.

        Arrays on the GPU are planned there, when `stream` comes to it, and not copied: the
        plan runs on that stream, and inside a CUDA graph together with its runs serves every
        batch up to this one: write other lengths and blocks into the arrays, seq_lens 0 for
        sequences that are not there, and replay. The plan keeps the arrays alive. With
        cu_seqlens_q max_total_q is then the rows of q and out; rows of no sequence are not
        written. Nothing is checked: lengths out of range count as the nearest that is not.

        Raises ValueError for lengths or used table entries that make no sense.

        Example::

            plan = attn.plan(batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
        """

    def run(self, plan: AttentionPlan, q: object, k_cache: object, v_cache: object, out: object | None = None, lse: object | None = None, sinks: object | None = None, alibi_slopes: object | None = None, k_scale: object | None = 1.0, v_scale: object | None = 1.0, stream: object | None = None) -> object:
        """
        Runs a plan on one layer's tensors and returns out.

        q [total_q, num_heads, head_dim], of dtype; out likewise, head_dim_v wide, but bfloat16
        where that is float8_e4m3; k_cache [num_blocks, block_size, num_kv_heads, head_dim],
        v_cache likewise, head_dim_v wide, any strides with the last dimension contiguous; lse
        float32 [num_heads, total_q], written if given; sinks, alibi_slopes float32 [num_heads];
        k_scale, v_scale of a quantised cache, as for paged_attention().

        Raises ValueError, before any work, naming the wrong tensor.

        Example::

            attn.run(plan, q, cache.k(layer), cache.v(layer), out=out)
        """

    def run_part(self, plan: AttentionPlan, ith: int, nth: int, q: object, k_cache: object, v_cache: object, out: object, workspace: object, lse: object | None = None, sinks: object | None = None, alibi_slopes: object | None = None, k_scale: object = 1.0, v_scale: object = 1.0) -> None:
        """
        Runs one of nth parts of what run() does, for hosts with threads of their own.

        All parts, ith = 0 ... nth - 1, are to be called with the same arguments, in any order
        and from any threads; when all have returned, out has the bits that run() gives. No
        part waits for another, and none uses quire's threads. workspace uint8
        [workspace_size(plan)], zeros before its first use, is left ready for the next run of
        this or another plan that it is large enough for; one run at a time. CPU only.

        Raises ValueError, before any work, naming the wrong argument.

        Example::

            workspace = numpy.zeros(attn.workspace_size(plan), numpy.uint8)
            for i in range(n):  # or on n threads
                attn.run_part(plan, i, n, q, k_cache, v_cache, out, workspace)
        """

    def workspace_size(self, plan: AttentionPlan) -> int:
        """
        Bytes of scratch memory that run() uses for this plan, and run_part() asks for.

        Example::

            attn.workspace_size(plan)
        """

    def explain(self) -> str:
        """
        The candidate kernels, a line each: the chosen one, and why each other one lost.

        Example::

            print(attn.explain())
        """

def attention(q: object | None, k: object | None, v: object | None, out: object | None, lse: object | None, causal: bool, window: tuple[int, int], scale: float | None, softcap: float, alibi_slopes: object | None, sinks: object | None, mask: object | None, mask_is_tree: bool, cu_seqlens_q: object | None, cu_seqlens_k: object | None, stream: object | None = None) -> None: ...

def paged_attention(q: object | None, k_cache: object | None, v_cache: object | None, block_table: object | None, seq_lens: object | None, out: object | None, lse: object | None, cu_seqlens_q: object | None, causal: bool, window: tuple[int, int], scale: float | None, softcap: float, alibi_slopes: object | None, sinks: object | None, mask: object | None, mask_is_tree: bool, k_scale: object | None, v_scale: object | None, stream: object | None = None) -> None: ...

def append_kv(k: object | None, v: object | None, k_cache: object | None, v_cache: object | None, slot_mapping: object | None, rope: object | None, k_scale: object | None, v_scale: object | None, stream: object | None = None) -> None: ...

def apply_rope(x: object | None, rope: object | None, out: object | None) -> None: ...

def copy_blocks(k_cache: object | None, v_cache: object | None, src_dst: object | None) -> None: ...

def swap_blocks(src: object | None, dst: object | None, src_dst: object | None) -> None: ...

def merge_states(outs: object | None, lses: object | None, out: object | None, lse: object | None) -> None: ...

def attention_backward(dout: object | None, q: object | None, k: object | None, v: object | None, out: object | None, lse: object | None, dq: object, dk: object, dv: object, dsinks: object | None, causal: bool, window: tuple[int, int], scale: float | None, softcap: float, alibi_slopes: object | None, sinks: object | None, mask: object | None, mask_is_tree: bool, cu_seqlens_q: object | None, cu_seqlens_k: object | None) -> None: ...

class LayerGroup:
    """
    Layers of a model that keep the same part of the KV, for KVCacheManager(groups=...).

    Kinds: "full" attention; "sliding_window": the last `window` tokens, the token's own
    included, as paged_attention(window=(window - 1, 0)); "chunked_local": tokens since
    position p // chunk * chunk; "state": one block a sequence, as of Mamba. Groups with
    many layers may be named more than once, so that all have as many.

    Every group has blocks of its own, all out of one pool. What no later token reads goes
    back when commit() has moved on: its entries of the block table are -1. A cached prefix
    is found as far as every group has what it needs: a window its last tokens, a state a
    checkpoint, which is kept wherever a step ended with a block. The first group is full
    attention; a model without such layers takes one full group for all.

    Raises ValueError for another kind, or a window or chunk below 1 or of the wrong kind.

    Example::

        local = quire.LayerGroup("sliding_window", window=1024)
        manager = quire.KVCacheManager(4096, 16, groups=[quire.LayerGroup(), local])
        batch = manager.step(seqs, counts)
        batch.groups[1].block_table        # of the windowed layers
    """

    def __init__(self, kind: Literal['full', 'sliding_window', 'chunked_local', 'state'] = 'full', *, window: int | None = None, chunk: int | None = None) -> None: ...

    @property
    def kind(self) -> str:
        """full, sliding_window, chunked_local or state."""

    @property
    def window(self) -> int | None:
        """Tokens of a sliding window."""

    @property
    def chunk(self) -> int | None:
        """Tokens of a chunk."""

    def __repr__(self) -> str: ...

class Sequence:
    """
    A handle of KVCacheManager.create() or fork(); valid until KVCacheManager.free().

    Every property raises ValueError once the sequence is freed.

    Example::

        seq = manager.create(prompt)
        todo = seq.num_tokens - seq.num_computed_tokens
    """

    @property
    def num_tokens(self) -> int:
        """Known tokens."""

    @property
    def num_computed_tokens(self) -> int:
        """Leading tokens whose KV is in the cache."""

    @property
    def num_cached_tokens(self) -> int:
        """Leading tokens whose KV was there when the sequence was created."""

    @property
    def id(self) -> int:
        """
        A number unique in the process; step(), commit() and free() take int64 arrays of them.
        """

    @property
    def token_ids(self) -> numpy.typing.NDArray[numpy.int32]:
        """The known tokens, int32 [num_tokens], a copy."""

    @property
    def block_table(self) -> numpy.typing.NDArray[numpy.int32]:
        """Ids of the sequence's blocks, int32 [num_blocks], a copy."""

    @property
    def block_tables(self) -> list[numpy.typing.NDArray[numpy.int32]]:
        """
        The same of each layer group; -1: given back. Of a state its one block, or none.
        """

class StepBatch:
    """
    The arrays of one step. They are views of memory that the next step overwrites, whichever
    thread calls it: after it, the properties raise ValueError.

    Example::

        plan = attn.plan(batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
        quire.copy_blocks(k_cache, v_cache, batch.copies)
        quire.append_kv(k, v, k_cache, v_cache, batch.slot_mapping)
    """

    @property
    def ticket(self) -> int:
        """The step's number, 1, 2, ..., for retire()."""

    @property
    def groups(self) -> list[StepBatch]:
        """
        The step as each layer group sees it: own block_table, slot_mapping, copies, changes.

        The first is the step itself.
        """

    @property
    def block_table(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        Block ids, int32 [batch, max_blocks]; what lies beyond seq_lens has no meaning.

        -1: a block that a layer group has given back. Of a state group [batch, 1]: the block
        whose state the step reads (unless it begins at position 0) and then overwrites.
        """

    @property
    def slot_mapping(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        Where each new token's KV goes, int64 [total new tokens]: block * block_size + offset.
        Of a state group empty.
        """

    @property
    def seq_lens(self) -> numpy.typing.NDArray[numpy.int32]:
        """Tokens of each sequence, the new ones included, int32 [batch]."""

    @property
    def cu_seqlens_q(self) -> numpy.typing.NDArray[numpy.int32]:
        """Where the new tokens of each sequence begin, int32 [batch + 1]."""

    @property
    def positions(self) -> numpy.typing.NDArray[numpy.int32]:
        """Position of each new token in its sequence, int32 [total new tokens]."""

    @property
    def copies(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        Blocks (source, destination) to copy before KV is written, int32 [copies, 2].
        """

    @property
    def changes(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        Entries of block_table that this step wrote, int32 [changes, 2]: (index, block).

        The index is row * stride + column, with the row stride of block_table in elements.
        A copy on a device that had all changes so far needs these alone, unless block_table's
        stride or memory is another than before: then all entries in use are here.
        """

class KVCacheManager:
    """
    The sequences of an engine and the blocks that hold their KV.

    `prefix_caching` shares the blocks of equal prefixes; `async_depth` is how many
    steps may run while the host plans on (see retire). `eviction`: "lru", or
    "reuse_lru", which keeps longer what was hit before. `event_capacity`: events kept
    for take_events(). `num_host_blocks`: for swap_out(). `groups`: what the model's
    layers read, the first full attention; see LayerGroup.

    Any number of threads may call every method. match() and stats() release the GIL
    and give way to the others after every few blocks, so that they don't hold up whoever
    plans the steps. A StepBatch is for the thread that steps.

    Steps of the same sequences with one token each cost least, with all arguments as
    arrays: `ids = np.array([seq.id for seq in seqs])`.

    Raises ValueError for counts below 1 and wrong groups. Every method either does all it says or
    raises and changes nothing.

    Example::

        manager = quire.KVCacheManager(num_blocks=4096, block_size=16)
        seq = manager.create(prompt)
        batch = manager.step([seq], [seq.num_tokens - seq.num_computed_tokens])
        ...                                # run the model on the batch
        manager.commit([seq], sampled)     # int32 [1]
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True, async_depth: int = 0, *, eviction: str = 'lru', event_capacity: int = 0, num_host_blocks: int = 0, groups: _Sequence[LayerGroup] = ()) -> None: ...

    @property
    def groups(self) -> list[LayerGroup]:
        """The layer groups."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""

    @property
    def block_size(self) -> int:
        """Tokens a block."""

    @property
    def num_free_blocks(self) -> int:
        """Blocks neither used nor cached; free + used + cached == num_blocks."""

    @property
    def num_used_blocks(self) -> int:
        """Blocks that sequences hold, each counted once."""

    @property
    def num_cached_blocks(self) -> int:
        """
        Blocks that no sequence holds, kept for their contents until they are needed.
        """

    @property
    def num_used_tokens(self) -> int:
        """
        Computed tokens of live sequences, those in shared blocks counted once.
        """

    def create(self, token_ids: numpy.typing.ArrayLike, salt: str | None = None, *, priority: int = 0, ttl: float | None = None) -> Sequence:
        """
        A sequence of these tokens, int32 [n], that shares the cached prefix.

        At least the last token is left to compute. A prefix may end inside a block: the
        first step copies its tokens (StepBatch.copies). Sequences of different salts share
        nothing.

        Once nobody uses its blocks, those of lower `priority` (0 to 100) are evicted first,
        and of one priority the least recently used; `ttl` seconds later they count as the
        lowest. Of several sequences that held a block the highest priority counts.

        Raises ValueError for no tokens, a priority outside 0 to 100, or a negative ttl.

        Example::

            seq = manager.create(np.array([1, 2, 3], np.int32))
        """

    @overload
    def fork(self, seq: Sequence) -> Sequence:
        """
        A sequence of the same tokens that shares every block with computed tokens.

        The first write into a shared partial block copies it: see StepBatch.copies. With a
        state group, raises ValueError between step and commit: the state may be the step's.

        Example::

            child = manager.fork(seq)
        """

    @overload
    def fork(self, seq: Sequence, n: int) -> list[Sequence]:
        """
        n such sequences, at a cost that does not grow with their length.

        Raises ValueError for a negative n.

        Example::

            beams = manager.fork(seq, 8)
        """

    def truncate(self, seq: Sequence, num_tokens: int) -> None:
        """
        Keeps the first num_tokens tokens, 1 or more: the rest was rejected.

        May come between step() and commit(). Where a layer group has given up what it needs
        to go on from there, the sequence computes tokens again: num_computed_tokens falls.

        Example::

            manager.truncate(seq, seq.num_tokens - num_rejected)
        """

    def match(self, token_ids: numpy.typing.ArrayLike, salt: str | None = None) -> int:
        """
        How many tokens create() would find cached; no side effect.

        Example::

            hit = manager.match(prompt)
        """

    def pin(self, what: Sequence | numpy.typing.ArrayLike, salt: str | None = None) -> int:
        """
        Keeps cached blocks from eviction until they are unpinned as often.

        `what`: a sequence, for its computed tokens, or the tokens of a prefix, int32 [n].
        Returns how many tokens that are: those of the whole blocks that are cached.

        Example::

            manager.pin(system_prompt)
        """

    def unpin(self, what: Sequence | numpy.typing.ArrayLike, salt: str | None = None) -> int:
        """
        Takes one pin() back; returns how many tokens were pinned.

        Example::

            manager.unpin(system_prompt)
        """

    def free(self, seqs: list[Sequence] | numpy.typing.NDArray[numpy.int64]) -> None:
        """
        Ends sequences; what they computed stays cached as long as there is room.

        Raises ValueError for a sequence that was freed before, or is named twice.

        Example::

            manager.free([seq])
        """

    def step(self, seqs: list[Sequence] | numpy.typing.NDArray[numpy.int64], num_new_tokens: numpy.typing.ArrayLike, *, lookahead: int = 0) -> StepBatch | None:
        """
        Gives slots to the next tokens of each sequence, int32 [batch] known ones.

        `seqs`: a list, or an int64 array of Sequence.id. With `lookahead` the rows of
        block_table reach that many tokens farther: room for drafts not yet known.

        None when out of blocks: then nothing has changed. A second step without commit
        plans the same tokens again. Raises ValueError for a freed sequence, one named
        twice, or a count that is negative or beyond the known tokens.

        Example::

            batch = manager.step(seqs, np.ones(len(seqs), np.int32))
        """

    def commit(self, seqs: list[Sequence] | numpy.typing.NDArray[numpy.int64], sampled: numpy.typing.ArrayLike | list[numpy.typing.ArrayLike] | None = None) -> None:
        """
        The KV of the stepped tokens is written: full blocks become shareable.

        `sampled` appends new tokens: int32 [batch], one each, or a list of arrays.
        Raises ValueError for a wrong length, or tokens for a sequence whose step left
        known tokens to compute.

        Example::

            manager.commit(seqs, logits.argmax(-1).astype(np.int32))
        """

    def retire(self, ticket: int) -> None:
        """
        The step of this ticket and all before it have run; needs async_depth > 0.

        Blocks freed or copied from meanwhile rejoin the pool. Raises ValueError for a
        ticket that was retired or never given.

        Example::

            manager.retire(batch.ticket)
        """

    def group_stats(self) -> list[dict[str, int]]:
        """
        Blocks of each layer group: used_blocks, that sequences hold, and cached_blocks, that
        nobody holds.

        Example::

            manager.group_stats()[1]["used_blocks"]
        """

    def validate(self) -> None:
        """
        Checks every count, list and reference; raises RuntimeError for a broken one.

        Example::

            manager.validate()
        """

    def stats(self) -> quire._stats.KVCacheStats:
        """
        Counts of blocks and tokens now, and of hits and evictions since the start.

        Example::

            manager.stats().waste_tokens
        """

    def take_events(self) -> list[CacheEvent]:
        """
        What happened to cached blocks since the last call, the oldest first.

        At most event_capacity are kept: of more the oldest are lost, which leaves a gap in
        CacheEvent.sequence and adds to stats().lost_events. Without a gap, the blocks stored
        and not removed, evicted or swapped since are those that prefixes can be found in; of a sequence
        that ends inside a block, that one too.

        Example::

            for event in manager.take_events():
                router.apply(event)
        """

    def snapshot(self) -> str:
        """
        The whole state as JSON, but for attached stores and events.

        Raises ValueError while a fetch is under way.

        Example::

            path.write_text(manager.snapshot())
        """

    def sequences(self) -> list[Sequence]:
        """
        All sequences that were not freed, in no order.

        Example::

            manager.free(manager.sequences())
        """

    @staticmethod
    def restore(snapshot: str) -> KVCacheManager:
        """
        A manager that goes on where the one of the snapshot was, with the same block ids.

        Its sequences are in sequences(). Where it keeps events, the first ones name what is
        cached. Raises ValueError for what is no consistent snapshot.

        Example::

            manager = quire.KVCacheManager.restore(path.read_text())
        """

    def clear_cache(self) -> int:
        """
        Gives up all cached blocks that nobody uses; returns how many those were.

        For new weights, or what must not stay. Events say "removed", no store is offered
        them. What is in use stays findable, and stores keep what they have.

        Example::

            manager.free(manager.sequences())
            manager.clear_cache()
        """

    def set_time(self, ns: int) -> None:
        """
        Counts times to live from and to this time, in ns, and not the system's any more.

        For tests, and for logs that have to run again as they ran. Raises ValueError outside
        0 to 2^60.

        Example::

            manager.set_time(5_000_000_000)
        """

    def attach_store(self, store: KVStore) -> None:
        """
        Where fetch() looks and evicted blocks may go; the nearest first, one a tier.

        KVTiers attaches its stores itself. Raises ValueError without prefix caching, or for a
        second store of a tier.

        Example::

            manager.attach_store(store)
        """

    def take_offloads(self) -> list[KVTransfer]:
        """
        Whole blocks that the latest step(), schedule() of a Scheduler, fetch() or swap_in()
        evicted, and a store lacks.

        Their contents are lost unless they are put there before any KV is written. Each comes
        once.

        Example::

            for transfer in manager.take_offloads():
                ...
        """

    def fetch(self, seq: Sequence) -> list[KVTransfer] | None:
        """
        Gives a sequence blocks for what stores hold of its tokens behind the computed ones.

        The transfers, in order, are to be got from the store of their tier; then fetched()
        says how many came, and until then the sequence can do nothing. Of several layer groups
        each block is a transfer of its own. None when out of blocks: then nothing has changed.
        Raises ValueError after a step without commit.

        Example::

            loads = manager.fetch(seq)
        """

    def fetched(self, seq: Sequence, num_blocks: int) -> None:
        """
        The first num_blocks blocks of a fetch() hold their KV; the others are given back.

        What these make complete is computed now; of several layer groups that may be less.

        Example::

            manager.fetched(seq, len(loads))
        """

    def swap_out(self, seq: Sequence) -> numpy.typing.NDArray[numpy.int32] | None:
        """
        Moves a sequence to host memory: (block, host block) to copy, int32 [n, 2].

        It holds no block of the pool until swap_in(). Of a window or a chunk that a layer group
        reads, its blocks alone. None when there are too few host blocks: then nothing has
        changed. With a state group, raises ValueError between step and commit.

        Example::

            quire.swap_blocks(cache, host_cache, manager.swap_out(seq))
        """

    def swap_in(self, seq: Sequence) -> numpy.typing.NDArray[numpy.int32] | None:
        """
        Brings a sequence back: (host block, block) to copy, int32 [n, 2], all or nothing.

        What the prefix cache still has needs no copy. None when out of blocks.

        Example::

            quire.swap_blocks(host_cache, cache, manager.swap_in(seq))
        """

    def is_swapped_out(self, seq: Sequence) -> bool:
        """
        Whether a sequence waits in host memory.

        Example::

            manager.is_swapped_out(seq)
        """

class CacheEvent:
    """
    What happened to a cached block; see KVCacheManager.take_events().

    Example::

        event.kind, event.key.hex()
    """

    @property
    def sequence(self) -> int:
        """1, 2, 3, ...; a gap: events were lost."""

    @property
    def kind(self) -> str:
        """
        "stored" (can be found from now on), "removed" (given up by clear_cache()), "evicted"
        (given up for room) or "swapped" (so, too, and the store `tier` has been offered it or
        has it).
        """

    @property
    def tier(self) -> str:
        """"device", or of a swapped block "host" or "file"."""

    @property
    def block(self) -> int:
        """Its id in the pool."""

    @property
    def key(self) -> bytes:
        """The chain key, 32 bytes; of whole blocks as chain_keys() has it."""

    @property
    def parent(self) -> bytes:
        """The key of the block before, or the root key of the salt."""

class KVTransfer:
    """
    A block to copy to stores or from one; see take_offloads() and fetch().

    Example::

        store.get(transfer.key, out)
    """

    @property
    def block(self) -> int:
        """Its id in the pool."""

    @property
    def tier(self) -> str:
        """Of the store: "host" or "file"."""

    @property
    def key(self) -> bytes:
        """The chain key, 32 bytes."""

class ScheduledBatch(StepBatch):
    """
    One step of a Scheduler: what to compute, and all arrays of StepBatch, a row a request.

    Example::

        hidden = model(batch.token_ids, batch.positions, ...)
        last_rows = batch.cu_seqlens_q[1:][batch.sampling] - 1
    """

    @property
    def request_ids(self) -> numpy.typing.NDArray[numpy.int32]:
        """The request of each row, int32 [batch]."""

    @property
    def num_new_tokens(self) -> numpy.typing.NDArray[numpy.int32]:
        """Tokens to compute of each row, int32 [batch]."""

    @property
    def token_ids(self) -> numpy.typing.NDArray[numpy.int32]:
        """The tokens to compute, row after row, int32 [total new tokens]."""

    @property
    def sampling(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        The rows that compute their last known token and so sample the next, int32 [m].
        """

    @property
    def swap_out(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        Blocks of preempted requests to copy to host memory before the step, int32 [n, 2]:
        (block, host block).

        These come first, then swap_in, then copies; KVTiers.swap() makes both.
        """

    @property
    def swap_in(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        Blocks of requests that come back to copy before the step, int32 [n, 2]:
        (host block, block).
        """

    @property
    def num_preempted(self) -> int:
        """Requests that lost their blocks since the batch before."""

class PreemptionCosts:
    """
    What a Scheduler weighs when it takes a request's blocks: to compute its tokens again, or
    to move its blocks to host memory and back.

    seconds_per_token of prefill without attention, seconds_per_token_pair of attention (a
    query and a key), bytes_per_second between device and host one way (0: never move),
    seconds_per_swap once each way, bytes_per_block of all layers.

    Example::

        costs = quire.PreemptionCosts(seconds_per_token=1e-4, bytes_per_second=5e10,
                                      bytes_per_block=cache.block_bytes)
    """

    def __init__(self, *, seconds_per_token: float = 0.0, seconds_per_token_pair: float = 0.0, bytes_per_second: float = 0.0, seconds_per_swap: float = 0.0, bytes_per_block: int = 0) -> None: ...

    @property
    def seconds_per_token(self) -> float: ...

    @property
    def seconds_per_token_pair(self) -> float: ...

    @property
    def bytes_per_second(self) -> float: ...

    @property
    def seconds_per_swap(self) -> float: ...

    @property
    def bytes_per_block(self) -> int: ...

class Scheduler:
    """
    Continuous batching over a KVCacheManager.

    At most max_tokens_per_step tokens and max_seqs requests a step; long prompts are computed
    in chunks. Admission leaves the share `watermark` of the blocks free. When blocks run out,
    the last request (of the lowest priority, the latest) waits again and is computed anew;
    it keeps its generated tokens. Of `prefix_window` waiting requests of equal rank the one
    with the longest cached prefix comes first; who was overtaken max_overtakes times is due
    whatever its rank. Equal calls lead to equal decisions: see explain().

    With `preemption` costs and a manager of num_host_blocks, a request
    whose blocks are cheaper moved than computed again waits in host memory: each batch says
    what to copy before its step, swap_out and swap_in (KVTiers.swap).

    Any number of threads may call every method: one schedules and commits, others add.

    Raises ValueError for counts below 1, a watermark outside [0, 1) or negative costs.

    Example::

        scheduler = quire.Scheduler(manager)
        scheduler.add(prompt, max_new_tokens=100)
        while (batch := scheduler.schedule()) is not None:
            scheduler.commit(model(batch))     # int32, a token for each of batch.sampling
    """

    def __init__(self, manager: KVCacheManager, *, max_tokens_per_step: int = 2048, max_seqs: int = 256, watermark: float = 0.01, prefix_window: int = 1, max_overtakes: int = 256, preemption: PreemptionCosts | None = None) -> None: ...

    def add(self, token_ids: numpy.typing.ArrayLike, max_new_tokens: int, salt: str | None = None, *, priority: int = 0, tenant: str = '') -> int:
        """
        Queues a request of these prompt tokens, int32 [n]; returns its id: 0, 1, 2, ...

        Higher priorities come first; of one priority the tenant whose requests had the fewest
        tokens computed and sampled (these count twice more), then whoever came first.

        Raises ValueError if prompt and max_new_tokens can never fit the pool.

        Example::

            request_id = scheduler.add(prompt, max_new_tokens=100)
        """

    def schedule(self) -> ScheduledBatch | None:
        """
        Plans the next step.

        None when there is nothing to do or, if has_work still holds, when blocks first have
        to come back through KVCacheManager.retire(). Raises ValueError if the batch before
        was not committed.

        Example::

            batch = scheduler.schedule()
        """

    def commit(self, sampled: numpy.typing.ArrayLike) -> list[int]:
        """
        The step has run; `sampled` int32 [m] are its new tokens in the order of batch.sampling.

        Returns the ids of requests that have reached max_new_tokens. Raises ValueError for
        a wrong length.

        Example::

            finished = scheduler.commit(sampled)
        """

    def finish(self, request_id: int) -> None:
        """
        Ends a request early, in any state; no effect on one that has ended.

        Raises ValueError for an id that add() never returned.

        Example::

            scheduler.finish(request_id)
        """

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, preempted ones too."""

    @property
    def num_preemptions(self) -> int:
        """How often a request lost its blocks so far."""

    @property
    def has_work(self) -> bool:
        """Whether a request is running or waiting."""

    def explain(self) -> str:
        """
        What the latest schedule() decided, and why no further request was admitted.

        A line each: who was preempted, admitted, computed in chunks, and what the next one
        waits for.

        Example::

            print(scheduler.explain())
        """

    def validate(self) -> None:
        """
        Checks the queues and the manager; raises RuntimeError for a broken invariant.

        Example::

            scheduler.validate()
        """

def chain_keys(token_ids: numpy.typing.ArrayLike, block_size: int, salt: str | None = None) -> numpy.typing.NDArray[numpy.uint8]:
    """
    The SHA-256 chain keys of the full blocks of int32 [n] tokens: uint8 [n // block_size, 32].

    A key names a block and everything before it, the same in every process and on every
    machine: key i is SHA256(key i-1 || the block's tokens, int32 little-endian); before
    the first comes the root key, SHA256(b"quire.chain_key.v1\\n") without a salt and
    SHA256(b"quire.chain_key.v1\\nsalt=" + salt) with one (UTF-8). Tokens behind the last
    full block have no key. Raises ValueError for a block_size below 1.

    Example::

        keys = quire.chain_keys(prompt, block_size=16)
        store.put(keys[0], payload)
    """

def export_blocks(pools: _Sequence[Any], blocks: numpy.typing.ArrayLike) -> numpy.typing.NDArray[numpy.int64]:
    """
    Where blocks lie, to be read by what carries them: int64 [n, 2], (address, bytes).

    `pools`: tensors [num_blocks, ...] of any dtype, device and framework, the last dimension
    contiguous: KVCache.pools, or views of your own; `blocks`: int32 ids. Blocks of pool 0
    come first, in the order given, each in the order of its strides, the longest first;
    neighbours are merged. Both ends agree on what byte goes where if their pools have the
    same shapes but for num_blocks, dtypes and order of dimensions. Nothing is read; the
    addresses hold as long as the pools live.

    Raises ValueError for a block id outside a pool, and for a tensor that is no pool.

    Example::

        ranges = quire.export_blocks(cache.pools, seq.block_table)
    """

def import_blocks(pools: _Sequence[Any], blocks: numpy.typing.ArrayLike) -> numpy.typing.NDArray[numpy.int64]:
    """
    Where blocks are to be written: the list of export_blocks, for the other end.

    Raises ValueError also for a block that is named twice, and for memory that is read-only
    or would be written twice.

    Example::

        ranges = quire.import_blocks(cache.pools, seq.block_table)
    """

def pair_ranges(sources: numpy.typing.NDArray[numpy.int64], destinations: numpy.typing.NDArray[numpy.int64]) -> numpy.typing.NDArray[numpy.int64]:
    """
    Cuts two lists of as many bytes into pieces of one size: int64 [n, 3], (source address,
    destination address, bytes), for transfers that name both ends.

    Raises ValueError for lists of different sizes.

    Example::

        pieces = quire.pair_ranges(theirs, quire.import_blocks(cache.pools, ids))
    """

class KVTicket:
    """
    A request that a KVStore has taken. It keeps the request's buffer alive; dropping it
    waits until the store needs the buffer no more.

    Example::

        ticket = store.get(key, out)
        if ticket is not None and ticket.wait() == "done":
            ...
    """

    @property
    def outcome(self) -> str:
        """"pending", "done", "missing" (get) or "failed" (put)."""

    def wait(self) -> str:
        """
        Waits for the outcome and returns it.

        Example::

            ticket.wait()
        """

class KVStore:
    """
    A slower place for the contents of KV blocks, found again by chain key: HostStore,
    FileStore. All methods may be called from any thread.

    Example::

        store = quire.HostStore(capacity_bytes=8 << 30, block_bytes=block.nbytes)
        key = quire.chain_keys(prompt, block_size=16)[0]
        ticket = store.put(key, block)
    """

    def put(self, key: Any, payload: Any) -> KVTicket | None:
        """
        Stores a payload, block_bytes bytes of a contiguous buffer, under a key of 32 bytes.

        None: the queue is full and nothing has changed. The payload must not change while
        the ticket is pending. A key that is there keeps its block. Raises ValueError for a
        wrong size, TypeError for what is no contiguous buffer.

        Example::

            ticket = store.put(keys[0], block)
        """

    def get(self, key: Any, out: Any) -> KVTicket | None:
        """
        Fills `out`, block_bytes bytes of a writable contiguous buffer, with a payload.

        None: the queue is full. Unless the outcome is "done", `out` may hold anything.
        Gets do not wait for puts that wait.

        Example::

            store.get(keys[0], out).wait()
        """

    def contains(self, key: Any) -> bool:
        """
        Whether a put of this key has completed, and the block is still there.

        Example::

            store.contains(keys[0])
        """

    def erase(self, key: Any) -> bool:
        """
        Gives a block up; False if it was not there. A put that waits is not undone.

        Example::

            store.erase(keys[0])
        """

    def drain(self) -> None:
        """
        Waits until every request taken so far has completed.

        Example::

            store.drain()
        """

    @property
    def tier(self) -> str:
        """"host" or "file"."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a payload."""

    def stats(self) -> dict[str, int]:
        """
        Counts: num_blocks, capacity_blocks, num_pending now; stored, hits, misses, evicted,
        not_taken (queue full), failed (puts), dropped (torn or rotten blocks, never
        delivered), callback_errors since the start.

        Example::

            store.stats()["hits"]
        """

class HostStore(KVStore):
    """
    Blocks in host memory; the least recently used are given up beyond capacity_bytes.

    Up to max_pending gets and as many puts may wait. Raises ValueError unless a block fits.

    Example::

        store = quire.HostStore(capacity_bytes=8 << 30, block_bytes=2 << 20)
    """

    def __init__(self, capacity_bytes: int, block_bytes: int, max_pending: int = 64) -> None: ...

class FileStore(KVStore):
    """
    Blocks in a directory of checksummed files, found again by the next process.

    `identity` says what the bytes mean (model, dtype, layout). A process killed at any
    moment loses at most the puts that had not completed; torn or rotten files are dropped
    and counted, never delivered. Raises ValueError for a directory of another block_bytes
    or identity or one in use, OSError for one that can't be used.

    Example::

        store = quire.FileStore("kv", capacity_bytes=100 << 30,
                                block_bytes=2 << 20, identity="llama-3-8b bf16")
    """

    def __init__(self, path: str, capacity_bytes: int, block_bytes: int, identity: str = '', max_pending: int = 64) -> None: ...

class CallLogWriter:
    """Used by RecordedKVCacheManager."""

    def __init__(self, path: str, num_blocks: int, block_size: int, prefix_caching: bool, async_depth: int, eviction: int, event_capacity: int, num_host_blocks: int, groups: list[LayerGroup]) -> None: ...

    def write(self, operation: int, outcome: int, seqs: list[int], values: list[int], counts: list[int], salt: str | None, number: int, results: list[Any]) -> None:
        """One call and its results."""

def replay_calls(path: str) -> tuple[int, str | None]:
    """
    Runs the calls of a log of RecordedKVCacheManager on a new manager.

    Returns how many calls gave what they gave when recorded, block ids included, and the
    first difference as text or None. A log that ends within a call, as after a crash, is
    replayed up to there. Raises ValueError for what is no log, OSError for a file that
    can't be read, RuntimeError where the manager ends up inconsistent.

    Example::

        num_calls, difference = quire.replay_calls("calls.quirelog")
        assert difference is None, difference
    """
