# SPDX-License-Identifier: Apache-2.0
"""torch.ops.quire.*: torch's own checks of operators, and whole graphs under torch.compile."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import quire
import torch

COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
    ),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch.compiler.reset()


def pools() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pool and its K and V [6, 16, 2, 32], as a cache has them: views that interleave."""
    pool = torch.randn(6, 2, 2, 16, 32)
    return pool, pool[:, :, 0].transpose(1, 2), pool[:, :, 1].transpose(1, 2)


def int32(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_rope(tokens: int) -> quire.Rope:
    angles = torch.outer(torch.arange(64.0), 10.0 ** -torch.arange(0, 1, 1 / 16))
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    return quire.Rope(cos_sin, torch.arange(tokens, dtype=torch.int32))


def operator_calls() -> dict[str, tuple[object, ...]]:
    q, k, v = torch.randn(3, 4, 32), torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    k_cache, v_cache = torch.randn(6, 16, 2, 32), torch.randn(6, 16, 2, 32)
    rope = make_rope(3)
    parts = (rope.cos_sin, rope.positions, rope.interleaved)
    out, lse = torch.empty(3, 4, 32), torch.empty(4, 3)
    options = (True, [5, -1], 0.3, 2.0, torch.rand(4), torch.rand(4), None, False)
    table, cu = int32([4, 1], [2, 0]), int32(0, 1, 3)
    scales = (1.0, None, 1.0, None)
    return {
        "attention": (q, k, v, out, lse, *options, cu, cu),
        "paged_attention": (
            *(q, k_cache, v_cache, table, int32(20, 3), out, lse, cu),
            *(*options, *scales),
        ),
        "append_kv": (k, v, k_cache, v_cache, torch.tensor([5, -1, 40]), *parts, *scales),
        "apply_rope": (q, *parts, out),
        "copy_blocks": (k_cache, v_cache, int32([0, 3], [1, 5])),
        "swap_blocks": (k_cache, v_cache, int32([0, 3], [1, 5])),
        "merge_states": (torch.randn(2, 3, 4, 32), torch.randn(2, 4, 3), out, lse),
    }


def test_opcheck():
    from quire.integrations import torch_ops

    calls = operator_calls()
    assert {schema.partition("(")[0] for schema in torch_ops._SCHEMAS} == set(calls)
    for name, arguments in calls.items():
        operator = getattr(torch.ops.quire, name).default
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}, name


def step(q, k, v, k_cache, v_cache, slots, table, seq_lens, copies, rope_parts):
    """What a layer does in one decode step, with the operations between others of torch."""
    rope = quire.Rope(*rope_parts)
    quire.copy_blocks(k_cache, v_cache, copies)
    quire.append_kv(k * 2, v, k_cache, v_cache, slots, rope=rope)
    q = quire.apply_rope(q + 1, rope)
    out, lse = quire.paged_attention(q, k_cache, v_cache, table, seq_lens, return_lse=True)
    window = quire.paged_attention(
        q, k_cache, v_cache, table, seq_lens, window=(3, 0), softcap=5.0, return_lse=True
    )
    merged, _ = quire.merge_states([out, window[0]], [lse, window[1]])
    return torch.relu(merged), k_cache.amax()


def step_arguments(batch: int):
    pool, k_cache, v_cache = pools()
    rope = make_rope(batch)
    table = int32([4, 1], [2, 5], [3, 0])[:batch]
    slots = torch.tensor([16 + 3, 2 * 16 + 7, 3 * 16 + 11])[:batch]
    q, k, v = (torch.randn(batch, heads, 32) for heads in (4, 2, 2))
    lengths = int32(20, 8, 12)[:batch]
    tensors = (q, k, v, k_cache, v_cache, slots, table, lengths, int32([0, 4]))
    return pool, (*tensors, (rope.cos_sin, rope.positions))


@pytest.mark.parametrize("backend", COMPILERS)
def test_a_decode_step_is_one_graph(backend):
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=backend == "aot_eager")
    for batch in (2, 3):
        pool, arguments = step_arguments(batch)
        before = pool.clone()
        out, greatest = compiled(*arguments)
        after = pool.clone()
        pool.copy_(before)
        expected, expected_greatest = step(*arguments)
        assert torch.equal(out, expected) and torch.equal(greatest, expected_greatest)
        assert torch.equal(after, pool) and not torch.equal(pool, before)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_dense_and_ragged_attention_compile(backend):
    def run(q, k, v, cu, mask):
        dense, lse = quire.attention(q[None], k[None], v[None], mask=mask, return_lse=True)
        ragged = quire.attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
        return dense[0] + ragged, lse

    q, k, v = torch.randn(9, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 24)
    mask = torch.randint(0, 256, (1, 9, 2), dtype=torch.uint8)
    arguments = (q, k, v, int32(0, 4, 9), mask)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for got, expected in zip(compiled(*arguments), run(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return quire.attention(q, k, v, causal=True)

    tensors = [torch.randn(1, 7, heads, 16) for heads in (4, 2, 2)]
    program = torch.export.export(Layer(), tuple(tensors))
    assert torch.equal(program.module()(*tensors), quire.attention(*tensors, causal=True))


def test_errors_of_compiled_functions_name_the_argument():
    def run(q, k):
        return quire.attention(q, k, k)

    q, k = torch.randn(1, 7, 4, 16), torch.randn(1, 7, 3, 16)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="attention: num_kv_heads: expected a divisor"):
        compiled(q, k)
    torch.compiler.reset()
    with pytest.raises(Exception, match="attention: q: expected a tensor without gradient"):
        compiled(q.requires_grad_(), q.detach())


def test_fake_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="attention: q: .*with memory"):
        quire.attention(*[torch.ones(1, 5, 2, 8)] * 3)


def test_the_operators_are_loaded_by_the_first_compilation_only():
    code = """
import sys, torch, quire
x = torch.ones(1, 5, 2, 8)
expected = quire.attention(x, x, x)
assert "quire.integrations.torch_ops" not in sys.modules
run = torch.compile(lambda x: quire.attention(x, x, x), fullgraph=True, backend="eager")
assert torch.equal(run(x), expected)
assert "quire.integrations.torch_ops" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
