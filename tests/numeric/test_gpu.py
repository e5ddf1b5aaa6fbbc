# SPDX-License-Identifier: Apache-2.0
"""What only a GPU has: streams, tensors in two places, plans in device memory."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quire as package
from cases import Case, Problem
from device import DEVICE, DTYPES, Transfer
from tolerance import check_lse, check_out

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs QUIRE_TEST_DEVICE=cuda or emulator")

BATCH = ((1, 700), (1, 40), (20, 300), (130, 130))


class Stream:
    """What torch, CuPy and cuda-python call a stream."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, 0)


def planned(dtype: str, num_layers: int, stream: object):
    """(problem, out, lse) of the last layer, from one plan."""
    problem = Problem.make(Case(dtype=dtype, num_heads=8, batch=BATCH))
    k_cache, v_cache, table, seq_lens = problem.paged()
    attn = package.Attention(
        num_heads=8, num_kv_heads=2, head_dim=64, dtype=dtype, block_size=16, device="cuda"
    )
    plan = attn.plan(table, seq_lens, problem.cu_seqlens_q())
    assert attn.workspace_size(plan) > 0
    q = np.concatenate(problem.qs)
    out, lse = np.full_like(q, np.nan), np.full((8, len(q)), np.nan, np.float32)
    moved = Transfer()
    arguments = [moved.to(x) for x in (q, k_cache, v_cache)]
    for _ in range(num_layers):
        attn.run(plan, *arguments, out=moved.to(out), lse=moved.to(lse), stream=stream)
    moved.back(out, lse)
    return problem, out, lse


@pytest.mark.parametrize("stream", [None, 0, 2, Stream()], ids=["none", "0", "thread", "object"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plan_once_run_often(dtype, stream):
    problem, out, lse = planned(dtype, 3, stream)
    exact = problem.exact()
    cu = problem.cu_seqlens_q()
    for (exact_out, exact_lse), naive, a, b in zip(
        exact, problem.naive(), cu, cu[1:], strict=False
    ):
        check_out(out[a:b], exact_out, naive, factor=3.0)
        check_lse(lse[:, a:b], exact_lse, dtype)


def test_a_wrong_stream_is_refused_by_name():
    with pytest.raises(TypeError, match="paged_attention: stream: .*got str"):
        planned("float16", 1, "fast")


class Graph:
    """What is called while it is open happens at every replay instead: a CUDA graph, or on the
    emulated GPU the launches that it keeps."""

    def __enter__(self) -> Graph:
        if DEVICE == "cuda":
            import torch

            self._graph = torch.cuda.CUDAGraph()
            self._capture = torch.cuda.graph(self._graph)
            self._capture.__enter__()
        else:
            self._library = ctypes.CDLL(
                str(Path(package._core.__file__).parent / "lib/libquire_cuda.so")
            )
            self._library.emulated_gpu_capture.argtypes = [ctypes.c_uint64]
            self._library.emulated_gpu_replay.restype = ctypes.c_char_p
            self._library.emulated_gpu_capture(1)
        return self

    def __exit__(self, *error: Any) -> None:
        if DEVICE == "cuda":
            self._capture.__exit__(*error)
        else:
            self._library.emulated_gpu_capture(0)

    def replay(self) -> None:
        if DEVICE == "cuda":
            self._graph.replay()
        else:
            error = self._library.emulated_gpu_replay()
            assert not error, error


def write(moved: Transfer, array: np.ndarray, values: Any) -> None:
    """Other values in an array that is on the device."""
    array[...] = values
    if DEVICE == "cuda":
        import torch

        moved.to(array).copy_(torch.from_numpy(array))


# (query rows, keys) of four sequences: smaller batches leave sequences or rows out.
RAGGED = [
    ((1, 700), (1, 40), (20, 300), (130, 130)),
    ((40, 640), (0, 0), (1, 704), (1, 1)),
    ((0, 0), (0, 0), (0, 0), (0, 0)),
    ((1, 5), (150, 700), (0, 9), (1, 600)),
    ((32, 32), (32, 700), (33, 500), (9, 3)),
]
ONE_ROW_EACH = [
    ((1, 700), (1, 40), (1, 3), (1, 704)),
    ((1, 0), (1, 704), (1, 1), (1, 0)),
    ((1, 600), (1, 600), (1, 600), (1, 600)),
]


def test_a_plan_keeps_the_arrays_that_the_device_reads_later():
    attn = package.Attention(
        num_heads=8, num_kv_heads=2, head_dim=64, dtype="float16", device="cuda"
    )
    moved = Transfer()
    arrays = [moved.to(np.ones(shape, np.int32)) for shape in ((2, 3), (2,))]
    alive = [weakref.ref(array) for array in arrays]
    plan = attn.plan(*arrays)
    del moved, arrays
    assert all(ref() is not None for ref in alive)
    del plan
    assert all(ref() is None for ref in alive)


@pytest.mark.parametrize("window", [(-1, -1), (200, 0)], ids=["all", "window"])
@pytest.mark.parametrize("batches", [RAGGED, ONE_ROW_EACH], ids=["ragged", "one-row-each"])
def test_one_graph_serves_every_batch(batches, window):
    rng = np.random.default_rng(0)
    attn = package.Attention(
        num_heads=8, num_kv_heads=2, head_dim=64, dtype="float16", window=window, device="cuda"
    )
    ragged, max_q, num_blocks = batches is RAGGED, 152 if batches is RAGGED else 4, 200
    q, out, out2 = (np.zeros((max_q, 8, 64), np.float16) for _ in range(3))
    k_cache, v_cache = rng.standard_normal((2, num_blocks, 16, 2, 64)).astype(np.float16)
    seq_lens, cu = np.zeros(4, np.int32), np.zeros(5, np.int32)
    table = np.zeros((4, 44), np.int32)
    moved = Transfer()
    lens, offsets, blocks = (moved.to(a) for a in (seq_lens, cu, table))
    caches = [moved.to(a) for a in (k_cache, v_cache)]
    lengths = {"cu_seqlens_q": offsets, "max_total_q": max_q} if ragged else {}
    attn.plan(table, seq_lens + 1)  # loads what a capture may not
    with Graph() as graph:
        plan = attn.plan(blocks, lens, **lengths)
        attn.run(plan, moved.to(q), *caches, out=moved.to(out))
        attn.run(plan, moved.to(q), *caches, out=moved.to(out2))
    for batch in batches:
        rows = np.cumsum([0] + [n for n, _ in batch])
        write(moved, seq_lens, [keys for _, keys in batch])
        write(moved, cu, rows)
        write(moved, table, rng.permutation(num_blocks)[: table.size].reshape(table.shape))
        write(moved, q, rng.standard_normal(q.shape))
        for array in (out, out2):
            write(moved, array, 7)
        graph.replay()
        moved.back(out, out2)
        expected = np.full_like(out, 7)
        here = Transfer()
        fresh = attn.plan(table, seq_lens, cu if ragged else None)
        n = int(rows[-1])
        own_q, own_out = q[:n].copy(), expected[:n].copy()
        attn.run(fresh, here.to(own_q), *caches, out=here.to(own_out))
        here.back(own_out)
        expected[:n] = own_out
        assert np.isfinite(expected.astype(np.float32)).all()
        np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
        np.testing.assert_array_equal(out2.view(np.uint16), expected.view(np.uint16))


def test_a_plan_of_a_capture_runs_in_that_capture_only():
    attn = package.Attention(
        num_heads=4, num_kv_heads=2, head_dim=64, dtype="float16", device="cuda"
    )
    moved = Transfer()
    table, lens = np.zeros((2, 3), np.int32), np.full(2, 20, np.int32)
    q, cache = np.zeros((2, 4, 64), np.float16), np.zeros((1, 16, 2, 64), np.float16)
    attn.plan(table, lens)
    with Graph():
        plan = attn.plan(moved.to(table), moved.to(lens))
        attn.run(plan, moved.to(q), moved.to(cache), moved.to(cache), out=moved.to(q.copy()))
    with pytest.raises(ValueError, match=r"attention: (plan|stream): expected"):
        attn.run(plan, moved.to(q), moved.to(cache), moved.to(cache), out=moved.to(q.copy()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_total_q": 4}, "max_total_q: expected with cu_seqlens_q"),
        ({"seq_lens": np.zeros(3, np.int32)}, r"seq_lens: expected \[2\] int32"),
        ({"seq_lens": np.zeros(2, np.int64)}, r"seq_lens: expected \[2\] int32"),
        ({"table": np.zeros(2, np.int32)}, r"block_table: expected \[batch, max_blocks\] int32"),
        ({"cu": np.zeros(3, np.int32)}, "max_total_q: expected with cu_seqlens_q"),
        ({"cu": np.zeros(2, np.int32), "max_total_q": 4}, r"cu_seqlens_q: expected \[3\] int32"),
    ],
)
def test_what_cannot_be_planned_on_the_device_is_refused_by_name(change, words):
    attn = package.Attention(
        num_heads=4, num_kv_heads=2, head_dim=64, dtype="float16", device="cuda"
    )
    given = {
        "table": np.zeros((2, 3), np.int32),
        "seq_lens": np.zeros(2, np.int32),
        "cu": None,
        "max_total_q": None,
        **change,
    }
    moved = Transfer()
    arrays = [moved.to(given[name]) for name in ("table", "seq_lens", "cu")]
    with pytest.raises(ValueError, match=words):
        attn.plan(*arrays, max_total_q=given["max_total_q"])


def append(k, slots, cache, rope=None):
    moved = Transfer()
    package.append_kv(
        moved.to(k), moved.to(k), moved.to(cache[0]), moved.to(cache[1]), slots(moved), rope=rope
    )
    moved.back(*cache)


@pytest.mark.parametrize("on_device", [False, True])
def test_slots_may_lie_on_either_side(on_device):
    rng = np.random.default_rng(0)
    k = rng.standard_normal((5, 2, 64), np.float32).astype(np.float16)
    cache = [np.zeros((4, 16, 2, 64), np.float16) for _ in "kv"]
    slots = np.array([40, -1, 3, 63, 17])
    append(k, (lambda moved: moved.to(slots)) if on_device else (lambda _: slots), cache)
    expected = np.zeros_like(cache[0])
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[slot // 16, slot % 16] = k[token]
    assert np.array_equal(cache[0], expected) and np.array_equal(cache[1], expected)


def test_slots_on_the_device_that_are_out_of_range_are_skipped():
    k = np.ones((3, 2, 64), np.float16)
    cache = [np.zeros((4, 16, 2, 64), np.float16) for _ in "kv"]
    append(k, lambda moved: moved.to(np.array([64, 2**40, -7])), cache)
    assert not cache[0].any() and not cache[1].any()
    with pytest.raises(ValueError, match=r"slot_mapping\[0\]"):
        append(k, lambda _: np.array([64, 0, 1]), cache)


def test_tensors_in_two_places_are_refused_by_name():
    problem = Problem.make(Case(dtype="float16", batch=((1, 40),)))
    k_cache, v_cache, table, seq_lens = problem.paged()
    q, moved = problem.qs[0], Transfer()
    tensors = [moved.to(x) for x in (q, k_cache, v_cache)]
    out = moved.to(np.empty_like(q))
    for wrong, name in ((1, "k_cache"), (2, "v_cache")):
        mixed = list(tensors)
        mixed[wrong] = (k_cache, v_cache)[wrong - 1]
        with pytest.raises(ValueError, match=f"paged_attention: {name}: .*cuda:0"):
            package.paged_attention(*mixed, table, seq_lens, out=out)
    with pytest.raises(ValueError, match="paged_attention: out: .*cuda:0"):
        package.paged_attention(*tensors, table, seq_lens, out=np.empty_like(q))
    with pytest.raises(ValueError, match="paged_attention: seq_lens: .*on cuda:0"):
        package.paged_attention(*tensors, table, moved.to(seq_lens), out=out)
    attn = package.Attention(
        num_heads=4, num_kv_heads=2, head_dim=64, dtype="float16", device="cuda"
    )
    with pytest.raises(ValueError, match="plan: seq_lens: .*on cuda:0 like block_table"):
        attn.plan(moved.to(table), seq_lens)
    with pytest.raises(ValueError, match="plan: seq_lens: .*on the CPU"):
        attn.plan(table, moved.to(seq_lens))
    with pytest.raises(ValueError, match="index of a GPU"):
        package.Attention(num_heads=4, num_kv_heads=2, head_dim=64, device="cuda:77")


def test_a_plan_of_the_cpu_is_refused():
    problem = Problem.make(Case(dtype="float16", batch=((1, 40),)))
    k_cache, v_cache, table, seq_lens = problem.paged()
    arguments = dict(num_heads=4, num_kv_heads=2, head_dim=64, dtype="float16")
    plan = package.Attention(**arguments).plan(table, seq_lens)
    moved = Transfer()
    with pytest.raises(ValueError, match="attention: plan: .*cuda:0"):
        package.Attention(**arguments, device="cuda").run(
            plan,
            *(moved.to(x) for x in (problem.qs[0], k_cache, v_cache)),
            out=moved.to(problem.qs[0]),
        )


def test_what_has_no_kernel_says_so():
    with pytest.raises(NotImplementedError, match="float32 is not implemented"):
        package.Attention(num_heads=4, num_kv_heads=2, head_dim=64, dtype="float32", device="cuda")
    with pytest.raises(NotImplementedError, match="head_dim 300"):
        package.Attention(num_heads=4, num_kv_heads=2, head_dim=300, device="cuda")


def test_blocks_swapped_between_pinned_memory_and_the_device():
    if DEVICE == "cuda":
        import torch

        host = torch.randn(4, 16, 2, 64, dtype=torch.float16).pin_memory()
        device = torch.zeros(6, 16, 2, 64, dtype=torch.float16, device="cuda")
        package.swap_blocks(host, device, np.array([[3, 0], [1, 5]], np.int32))
        assert torch.equal(device[[0, 5]].cpu(), host[[3, 1]])
        package.swap_blocks(device, host, np.array([[5, 0]], np.int32))
        torch.cuda.synchronize()
        assert torch.equal(host[0], host[1])
        pageable = torch.zeros(4, 16, 2, 64, dtype=torch.float16)
        with pytest.raises(ValueError, match="swap_blocks: dst: expected pinned"):
            package.swap_blocks(device, pageable, np.array([[0, 0]], np.int32))
        return
    host = np.random.default_rng(0).standard_normal((4, 16, 2, 64)).astype(np.float16)
    device = np.zeros((6, 16, 2, 64), np.float16)
    package.swap_blocks(host, Transfer().to(device), np.array([[3, 0], [1, 5]], np.int32))
    assert np.array_equal(device[[0, 5]], host[[3, 1]])
