# SPDX-License-Identifier: Apache-2.0
"""Threads: how many, what they cost while idle, fork, and hosts that bring their own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import quire

HEADS, KV_HEADS, DIM, BLOCK = 8, 2, 64, 16


def make_step(seed: int = 0):
    """A decode step of sequences that share 1024 tokens: (attention, plan, q, k_cache, v_cache)."""
    rng = np.random.default_rng(seed)
    seq_lens = np.array([1100, 1500, 30, 2100, 1025], np.int32)
    table = rng.permutation(5 * 140).astype(np.int32).reshape(5, 140)
    table[[1, 3, 4], :64] = table[0, :64]
    cache = rng.standard_normal((2, 700, BLOCK, KV_HEADS, DIM), np.float32)
    q = rng.standard_normal((5, HEADS, DIM), np.float32)
    attn = quire.Attention(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype="float32", block_size=BLOCK
    )
    return attn, attn.plan(table, seq_lens), q, cache[0], cache[1]


def compute() -> bytes:
    attn, plan, *tensors = make_step()
    return attn.run(plan, *tensors).tobytes()


@pytest.fixture
def threads():
    before = quire.num_threads()
    yield quire.set_num_threads
    quire.set_num_threads(before)


def test_import_does_not_turn_the_gil_on():
    """Where the interpreter has none; elsewhere it stays on."""
    code = (
        "import sys; on = getattr(sys, '_is_gil_enabled', lambda: True); import numpy; "
        "before = on(); import quire; assert on() == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shared_prefixes_are_found():
    attn, plan, *_ = make_step()
    assert plan.num_shared_items > 0
    assert plan.num_shared_items < plan.num_work_items
    alone = attn.plan(np.arange(70, dtype=np.int32)[None], np.array([1100], np.int32))
    assert alone.num_shared_items == 0


def test_after_a_fork_both_sides_compute(threads):
    threads(3)
    expected = compute()
    child = os.fork()
    if child == 0:
        os._exit(0 if compute() == expected and compute() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert compute() == expected


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method, threads):
    threads(2)
    expected = compute()
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = [pool.apply_async(compute) for _ in range(3)]
        assert [result.get(timeout=120) for result in results] == [expected] * 3


def test_idle_threads_take_no_time(threads):
    threads(4)
    compute()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_the_number_of_threads_follows_environment_and_affinity():
    code = "import os, quire; print(quire.num_threads(), len(os.sched_getaffinity(0)))"

    def run(prefix: str = "", **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", prefix + code],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )

    assert run(QUIRE_NUM_THREADS="7").stdout.split()[0] == "7"
    one = run("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n")
    assert one.stdout.split() == ["1", "1"]
    count, cpus = map(int, run(QUIRE_NUM_THREADS="").stdout.split())
    assert 1 <= count <= cpus
    for wrong in ("0", "many", "-3", "2.5"):
        refused = run(QUIRE_NUM_THREADS=wrong)
        assert refused.returncode != 0
        assert f"QUIRE_NUM_THREADS: expected 1 to 1024, got {wrong}" in refused.stderr


@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("in_threads", [False, True])
def test_parts_of_a_host_give_the_same_bits(nth, in_threads):
    attn, plan, *tensors = make_step()
    lse, expected_lse = (np.empty((HEADS, 5), np.float32) for _ in "ab")
    expected = attn.run(plan, *tensors, lse=expected_lse)
    workspace = np.zeros(attn.workspace_size(plan), np.uint8)
    for _ in range(3):  # layers
        out = np.full_like(expected, np.nan)
        lse[:] = np.nan

        def part(i: int, out: np.ndarray = out) -> None:
            attn.run_part(plan, i, nth, *tensors, out, workspace, lse=lse)

        if in_threads:
            workers = [threading.Thread(target=part, args=(i,)) for i in range(nth)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        else:
            for i in reversed(range(nth)):
                part(i)
        assert out.tobytes() == expected.tobytes()
        assert lse.tobytes() == expected_lse.tobytes()


def test_parts_refuse_wrong_arguments():
    attn, plan, q, k_cache, v_cache = make_step()
    out = np.full_like(q, 3)
    size = attn.workspace_size(plan)
    workspace = np.zeros(size + 1, np.uint8)

    def refused(match: str, ith=0, nth=2, workspace=workspace, q=q) -> None:
        with pytest.raises(ValueError, match=match):
            attn.run_part(plan, ith, nth, q, k_cache, v_cache, out, workspace)

    refused("ith: expected 0 to 1, got 2", ith=2)
    refused("ith: expected 0 to 1, got -1", ith=-1)
    refused("nth: expected at least 1, got 0", nth=0)
    refused(f"workspace: expected at least {size} bytes", workspace=workspace[: size - 1])
    refused("workspace: expected an address aligned", workspace=workspace[1:])
    refused("workspace: expected .* uint8", workspace=np.zeros(size, np.float32))
    refused("q: expected", q=q[:1])
    assert (out == 3).all()
    assert not workspace.any()
