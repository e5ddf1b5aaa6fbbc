"""Bindings of the quire runtime; use the package `quire`."""

from typing import Any

import numpy
import numpy.typing


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
    is 1/sqrt(head_dim); `softcap` 0 is none; `kv_dtype` None is `dtype`. Thread-safe.

    Raises ValueError for a wrong argument, NotImplementedError (with the text of explain())
    where no kernel fits.

    Example::

        attn = quire.Attention(num_heads=32, num_kv_heads=8, head_dim=128, dtype="float32")
        plan = attn.plan(block_table, seq_lens)          # once a step
        attn.run(plan, q, k_cache, v_cache, out=out)     # once a layer
    """

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str = 'bfloat16', kv_dtype: str | None = None, block_size: int = 16, causal: bool = True, window: tuple[int, int] = (-1, -1), softcap: float = 0.0, scale: float | None = None, device: str = 'cpu') -> None: ...

    def plan(self, block_table: object, seq_lens: object, cu_seqlens_q: object | None = None) -> AttentionPlan:
        """
        Plans one step of a batch.

        block_table int32 [batch, max_blocks], seq_lens int32 [batch] (the new tokens
        included), cu_seqlens_q int32 [batch + 1] or None for one query row each. The plan
        copies what it needs: the arrays may change afterwards.

        Raises ValueError for lengths or used table entries that make no sense.

        Example::

            plan = attn.plan(batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
        """

    def run(self, plan: AttentionPlan, q: object, k_cache: object, v_cache: object, out: object | None = None, lse: object | None = None, sinks: object | None = None, alibi_slopes: object | None = None, stream: object | None = None) -> object:
        """
        Runs a plan on one layer's tensors and returns out.

        q, out [total_q, num_heads, head_dim]; k_cache, v_cache [num_blocks, block_size,
        num_kv_heads, head_dim], any strides with the last dimension contiguous; lse float32
        [num_heads, total_q], written if given; sinks, alibi_slopes float32 [num_heads].

        Raises ValueError, before any work, naming the wrong tensor.

        Example::

            attn.run(plan, q, cache.k(layer), cache.v(layer), out=out)
        """

    def run_part(self, plan: AttentionPlan, ith: int, nth: int, q: object, k_cache: object, v_cache: object, out: object, workspace: object, lse: object | None = None, sinks: object | None = None, alibi_slopes: object | None = None) -> None:
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

def attention(q: object, k: object, v: object, out: object, lse: object | None, causal: bool, window: tuple[int, int], scale: float | None, softcap: float, alibi_slopes: object | None, sinks: object | None, mask: object | None, mask_is_tree: bool, cu_seqlens_q: object | None, cu_seqlens_k: object | None) -> None: ...

def paged_attention(q: object, k_cache: object, v_cache: object, block_table: object, seq_lens: object, out: object, lse: object | None, cu_seqlens_q: object | None, causal: bool, window: tuple[int, int], scale: float | None, softcap: float, alibi_slopes: object | None, sinks: object | None, mask: object | None, mask_is_tree: bool) -> None: ...

def append_kv(k: object, v: object, k_cache: object, v_cache: object, slot_mapping: object, rope: object | None) -> None: ...

def apply_rope(x: object, rope: object, out: object) -> None: ...

def copy_blocks(k_cache: object, v_cache: object, src_dst: object) -> None: ...

def swap_blocks(src: object, dst: object, src_dst: object) -> None: ...

def merge_states(outs: object, lses: object, out: object, lse: object) -> None: ...

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
    def token_ids(self) -> numpy.typing.NDArray[numpy.int32]:
        """The known tokens, int32 [num_tokens], a copy."""

    @property
    def block_table(self) -> numpy.typing.NDArray[numpy.int32]:
        """Ids of the sequence's blocks, int32 [num_blocks], a copy."""

class StepBatch:
    """
    The arrays of one step. They are views of memory that the next step overwrites: after it,
    the properties raise ValueError.

    Example::

        plan = attn.plan(batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
        quire.copy_blocks(k_cache, v_cache, batch.copies)
        quire.append_kv(k, v, k_cache, v_cache, batch.slot_mapping)
    """

    @property
    def ticket(self) -> int:
        """The step's number, 1, 2, ..., for retire()."""

    @property
    def block_table(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        Block ids, int32 [batch, max_blocks]; what lies beyond seq_lens has no meaning.
        """

    @property
    def slot_mapping(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        Where each new token's KV goes, int64 [total new tokens]: block * block_size + offset.
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

class KVCacheManager:
    """
    The sequences of an engine and the blocks that hold their KV.

    `prefix_caching` shares full blocks of equal prefixes; `async_depth` is how many
    steps may run while the host plans on (see retire). Not thread-safe.

    Raises ValueError for counts below 1. Every method either does all it says or
    raises and changes nothing.

    Example::

        manager = quire.KVCacheManager(num_blocks=4096, block_size=16)
        seq = manager.create(prompt)
        batch = manager.step([seq], [seq.num_tokens - seq.num_computed_tokens])
        ...                                # run the model on the batch
        manager.commit([seq], sampled)     # int32 [1]
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True, async_depth: int = 0) -> None: ...

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
        """Tokens whose KV lies in used blocks, shared blocks counted once."""

    def create(self, token_ids: numpy.typing.ArrayLike, salt: str | None = None) -> Sequence:
        """
        A sequence of these tokens, int32 [n], that shares the cached prefix.

        At least the last token is left to compute. Sequences of different salts share
        nothing. Raises ValueError for no tokens.

        Example::

            seq = manager.create(np.array([1, 2, 3], np.int32))
        """

    def fork(self, seq: Sequence) -> Sequence:
        """
        A sequence of the same tokens that shares every block with computed tokens.

        The first write into a shared partial block copies it: see StepBatch.copies.

        Example::

            child = manager.fork(seq)
        """

    def truncate(self, seq: Sequence, num_tokens: int) -> None:
        """
        Keeps the first num_tokens tokens, 1 or more: the rest was rejected.

        May come between step() and commit().

        Example::

            manager.truncate(seq, seq.num_tokens - num_rejected)
        """

    def free(self, seqs: list[Sequence]) -> None:
        """
        Ends sequences; what they computed stays cached as long as there is room.

        Raises ValueError for a sequence that was freed before, or is named twice.

        Example::

            manager.free([seq])
        """

    def match(self, token_ids: numpy.typing.ArrayLike, salt: str | None = None) -> int:
        """
        How many tokens create() would find cached; no side effect.

        Example::

            hit = manager.match(prompt)
        """

    def step(self, seqs: list[Sequence], num_new_tokens: numpy.typing.ArrayLike) -> StepBatch | None:
        """
        Gives slots to the next tokens of each sequence, int32 [batch] known ones.

        None when out of blocks: then nothing has changed. A second step without commit
        plans the same tokens again. Raises ValueError for a freed sequence, one named
        twice, or a count that is negative or beyond the known tokens.

        Example::

            batch = manager.step(seqs, np.ones(len(seqs), np.int32))
        """

    def commit(self, seqs: list[Sequence], sampled: numpy.typing.ArrayLike | list[numpy.typing.ArrayLike] | None = None) -> None:
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

    def stats(self) -> dict[str, int]:
        """
        Counts of blocks and tokens now, and of prefix hits and evictions since the start.

        Keys: num_blocks, block_size, free_blocks, used_blocks, cached_blocks,
        high_water_blocks, deferred_refs, used_tokens, waste_tokens, prefix_query_tokens,
        prefix_hit_tokens, evicted_blocks.

        Example::

            manager.stats()["waste_tokens"]
        """

    def validate(self) -> None:
        """
        Checks every count, list and reference; raises RuntimeError for a broken one.

        Example::

            manager.validate()
        """

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
    def num_preempted(self) -> int:
        """Requests that lost their blocks since the batch before."""

class Scheduler:
    """
    Continuous batching over a KVCacheManager, first come, first served.

    At most max_tokens_per_step tokens and max_seqs requests a step; long prompts are computed
    in chunks. Admission leaves the share `watermark` of the blocks free. When blocks run out,
    the latest request waits again and is computed anew; it keeps its generated tokens.

    Raises ValueError for counts below 1 or a watermark outside [0, 1).

    Example::

        scheduler = quire.Scheduler(manager)
        scheduler.add(prompt, max_new_tokens=100)
        while (batch := scheduler.schedule()) is not None:
            scheduler.commit(model(batch))     # int32, a token for each of batch.sampling
    """

    def __init__(self, manager: KVCacheManager, *, max_tokens_per_step: int = 2048, max_seqs: int = 256, watermark: float = 0.01) -> None: ...

    def add(self, token_ids: numpy.typing.ArrayLike, max_new_tokens: int, salt: str | None = None) -> int:
        """
        Queues a request of these prompt tokens, int32 [n]; returns its id: 0, 1, 2, ...

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

    def validate(self) -> None:
        """
        Checks the queues and the manager; raises RuntimeError for a broken invariant.

        Example::

            scheduler.validate()
        """
