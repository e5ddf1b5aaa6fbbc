# SPDX-License-Identifier: Apache-2.0
"""What only a GPU has: streams, tensors in two places, plans in device memory."""

from __future__ import annotations

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
    with pytest.raises(ValueError, match="plan: block_table: .*on the CPU"):
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
