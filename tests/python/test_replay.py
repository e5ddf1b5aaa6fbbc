# SPDX-License-Identifier: Apache-2.0
"""The replay loop: tokens share what the trace shares, and every request gets what it asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.replay.engine import Limits, Replay
from quire.replay.policies import Geometry, default_kv_bytes, make_policies
from quire.replay.samples import Sample, Samples
from quire.replay.synthetic import synthetic_trace
from quire.replay.table import ids_seen_before
from quire.replay.tokens import TokenSource
from quire.replay.trace import InputError, Trace, read_trace

SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces"
GEOMETRY = Geometry(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")
LIMITS = Limits(max_tokens_per_step=256, max_seqs=32)


def make_trace(ids: list[list[int]], input_lengths: list[int], block_size: int) -> Trace:
    n = len(ids)
    return Trace(
        "test",
        np.arange(n, dtype=np.float64),
        np.array(input_lengths, np.int64),
        np.ones(n, np.int64),
        np.array(sum(ids, []), np.int64),
        np.cumsum([0, *map(len, ids)]),
        block_size,
    )


def shared_tokens(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


@settings(max_examples=40, deadline=None)
@given(
    depths=st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=2, max_size=8),
    tails=st.data(),
    block_size=st.sampled_from([16, 512]),
)
def test_tokens_share_exactly_what_the_ids_share(depths, tails, block_size):
    # An id stands for its block and all before it: a path of choices has an id for each prefix.
    names: dict[tuple[int, ...], int] = {}
    ids = [
        [names.setdefault(tuple(path[: i + 1]), len(names)) for i in range(len(path))]
        for path in depths
    ]
    lengths = [len(x) * block_size + tails.draw(st.integers(1, block_size - 1)) for x in ids]
    source = TokenSource(make_trace(ids, lengths, block_size))
    prompts = [source.prompt(i) for i in range(len(ids))]
    assert [len(prompt) for prompt in prompts] == lengths
    for i, a in enumerate(ids):
        for j, b in enumerate(ids[:i]):
            common = sum(x == y for x, y in zip(a, b, strict=False))
            assert shared_tokens(prompts[i], prompts[j]) == common * block_size


def test_a_partial_last_block_belongs_to_its_id():
    source = TokenSource(make_trace([[1, 2], [1, 2], [1]], [700, 650, 512], 512))
    assert shared_tokens(source.prompt(0), source.prompt(1)) == 650
    assert shared_tokens(source.prompt(0), source.prompt(2)) == 512


def test_a_sequence_is_prompt_and_output():
    source = TokenSource(synthetic_trace(20, seed=3))
    prompt = source.prompt(7)
    whole = source.sequence(7, len(prompt) + 50)
    assert whole.dtype == np.int32 and (whole >= 0).all()
    assert np.array_equal(whole[: len(prompt)], prompt)
    positions = np.arange(len(prompt), len(whole), dtype=np.int32)
    outputs = source.output(np.full(50, 7, np.int32), positions)
    assert np.array_equal(whole[len(prompt) :], outputs)
    assert np.array_equal(source.sequence(7, 10), prompt[:10])


class Recorder:
    """A layer that counts the sampled tokens and checks the token ids of each step."""

    def __init__(self, source: TokenSource, num_requests: int) -> None:
        self.source = source
        self.sampled = np.zeros(num_requests, np.int64)
        self.cached = np.full(num_requests, -1)

    def step(self, batch) -> None:
        self.sampled[batch.request_ids[batch.sampling]] += 1
        begin = batch.cu_seqlens_q
        for i, request in enumerate(batch.request_ids.tolist()):
            tokens = batch.token_ids[begin[i] : begin[i + 1]]
            end = int(batch.seq_lens[i])
            assert np.array_equal(self.source.sequence(request, end)[end - len(tokens) :], tokens)
            if self.cached[request] < 0:
                self.cached[request] = end - len(tokens)


def run(trace: Trace, index: int, kv_bytes: int | None = None, layer=None) -> Replay:
    budget = default_kv_bytes(trace, GEOMETRY) if kv_bytes is None else kv_bytes
    policy = make_policies(trace, GEOMETRY, 16, budget or None, LIMITS.max_seqs)[index]
    replay = Replay(trace, policy, LIMITS, TokenSource(trace))
    replay.run(layer, lambda _: None)
    return replay


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_request_gets_its_output(index, seed):
    trace = synthetic_trace(40, seed)
    recorder = Recorder(TokenSource(trace), len(trace))
    replay = run(trace, index, layer=recorder)
    assert np.array_equal(recorder.sampled, trace.output_lengths)
    assert replay.done == replay.admitted == len(trace)
    assert replay.output_tokens == trace.output_lengths.sum()
    assert replay.prompt_tokens == trace.input_lengths.sum()
    assert replay.cached_tokens == recorder.cached.sum()
    assert (replay.running, replay.waiting, replay.leaked_blocks) == (0, 0, 0)
    assert (replay.cached_tokens > 0) == (index == 2)


def test_the_policies_differ_as_they_should():
    trace = synthetic_trace(60, seed=2)
    contiguous, paged, prefix = (run(trace, index) for index in range(3))
    assert contiguous.max_running < paged.max_running <= prefix.max_running
    assert contiguous.steps > paged.steps >= prefix.steps
    assert paged.preemptions > 0  # the budget is under pressure


def test_unlimited_memory_finds_every_id_that_was_seen():
    # One at a time, so that no two requests are admitted in one step.
    trace = synthetic_trace(40, seed=5)
    policy = make_policies(trace, GEOMETRY, 16, None, 1)[2]
    replay = Replay(trace, policy, Limits(64, 1), TokenSource(trace))
    replay.run(None, lambda _: None)
    assert replay.found_ids == round(ids_seen_before(trace) * len(trace.hash_ids))
    assert replay.countable_ids == len(trace.hash_ids)


def test_the_last_token_and_partial_blocks_count_honestly():
    # 512-token ids over 16-token blocks. The second request repeats the first, the fourth the
    # third: all but the last token is found, also in the middle of a block.
    trace = make_trace([[1, 2], [1, 2], [3], [3]], [700, 700, 16, 16], 512)
    policy = make_policies(trace, GEOMETRY, 16, None, 1)[2]
    replay = Replay(trace, policy, Limits(2048, 1), TokenSource(trace))
    replay.run(None, lambda _: None)
    assert replay.cached_tokens == 699 + 15
    assert (replay.found_ids, replay.countable_ids) == (3, 6)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("mooncake_conversation_a.jsonl.gz", None), ("agents_taubench_blk16.jsonl.gz", 0.859)],
)
def test_public_traces_reach_their_known_hit_rate(name, rate):
    if not (SHARED / name).exists():
        pytest.skip("the public traces are not beside this repository")
    trace = read_trace(SHARED / name).head(400 if rate is None else 10**6)
    replay = run(trace, 2, kv_bytes=0)
    known = ids_seen_before(trace) if rate is None else rate
    assert replay.found_ids / replay.countable_ids == pytest.approx(known, abs=0.002)


def test_samples_stay_bounded_and_uniform():
    samples, next_step = Samples(), 0
    for step in range(100_000):
        if step >= next_step:
            next_step = samples.add(Sample(step, 0.0, 1, 1, 0, 1, 0, 0.0))
    steps = samples.column("step")
    assert 1024 <= len(samples) <= 2048
    assert steps[0] == 0 and len(set(np.diff(steps))) == 1 and steps[-1] > 99_000 - steps[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GEOMETRY, 16, 1000, 8), "--kv-memory: expected .* for the longest request"),
        ((GEOMETRY, 1 << 20, None, 8), None),
        ((GEOMETRY, 16, 2**45, 8), "--kv-memory: expected at most"),
    ],
)
def test_policies_that_can_not_be(arguments, message):
    trace = synthetic_trace(30, seed=0)
    if message is None:
        assert make_policies(trace, *arguments)[1].num_blocks == 30
        return
    with pytest.raises(InputError, match=message):
        make_policies(trace, *arguments)


def test_a_geometry_that_can_not_be():
    with pytest.raises(InputError, match="--num-heads: expected a multiple of"):
        Geometry(3, 2, 16, "float32")
    with pytest.raises(InputError, match="--dtype: expected float32"):
        Geometry(4, 2, 16, "int8")
