# SPDX-License-Identifier: Apache-2.0
"""PrefixRouter: prefixes first, load within bounds, and books that close."""

from __future__ import annotations

import numpy as np
import pytest
import quire
from hypothesis import given
from hypothesis import strategies as st
from quire.router import PrefixRouter

BLOCK = 4


def keys(*blocks: int) -> np.ndarray:
    """Of a prompt of these blocks."""
    return quire.chain_keys(np.repeat(np.int32(blocks), BLOCK), BLOCK)


def test_the_longest_match_wins():
    router = PrefixRouter(3, max_imbalance=10)
    router.stored(1, keys(1, 2))
    router.stored(2, keys(1, 2, 3))
    assert router.match(keys(1, 2, 3, 4)) == [0, 2, 3]
    assert router.match(keys(2, 3)) == [0, 0, 0]  # other blocks before: other keys
    route = router.route(keys(1, 2, 3, 4))
    assert (route.replica, route.num_matched_blocks) == (2, 3)
    router.removed(2, keys(1, 2, 3)[1:])
    assert router.route(keys(1, 2, 3, 4)).replica == 2  # on its way there: as good as stored
    router.finish(route)


def test_what_is_gone_does_not_count():
    router = PrefixRouter(2, max_imbalance=10)
    router.stored(0, keys(1, 2, 3))
    router.removed(0, keys(1, 2, 3)[1:2])
    assert router.match(keys(1, 2, 3)) == [1, 0]  # a block behind a gap is no use
    router.reset(0, keys(1, 2))
    assert router.match(keys(1, 2, 3)) == [2, 0]
    router.reset(0)
    assert router.match(keys(1, 2, 3)) == [0, 0]


def test_a_replica_with_too_much_to_do_does_not_get_more():
    router = PrefixRouter(2, max_imbalance=2)
    router.stored(0, keys(1))
    routes = [router.route(keys(1, 10 + i)) for i in range(6)]
    assert [route.replica for route in routes] == [0, 0, 0, 1, 1, 1]
    assert router.loads == [3, 3]  # both have the prefix by now, or are about to
    for route in routes:
        router.finish(route)
    assert router.loads == [0, 0]


def test_without_prefixes_the_load_decides_then_memory():
    router = PrefixRouter(3, max_imbalance=5)
    router.stored(0, keys(1))
    assert [router.route(keys(2 + i), load=2).replica for i in range(4)] == [1, 2, 0, 1]
    assert router.route([]).replica == 2


def test_a_burst_of_one_prefix_stays_together():
    router = PrefixRouter(4, max_imbalance=8)
    routes = [router.route(keys(1, 2, 3)) for _ in range(5)]
    assert {route.replica for route in routes} == {0}
    assert [route.num_matched_blocks for route in routes] == [0, 3, 3, 3, 3]
    for route in routes:
        router.finish(route)
    assert router.match(keys(1, 2, 3)) == [0] * 4  # nothing was stored after all


@given(st.data())
def test_books(data):
    """Against plain sets, in any order of calls; the choice obeys its rule."""
    router, held, out = PrefixRouter(3, max_imbalance=3), [set(), set(), set()], []
    prompts = st.lists(st.integers(0, 1), max_size=4).map(lambda blocks: keys(*blocks))
    for _ in range(data.draw(st.integers(0, 25))):
        action, replica = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 2))
        prompt = data.draw(prompts)
        as_bytes = [key.tobytes() for key in prompt]
        if action == 0:
            router.stored(replica, prompt)
            held[replica].update(as_bytes)
        elif action == 1:
            router.removed(replica, as_bytes)
            held[replica].difference_update(as_bytes)
        elif action == 2 and out:
            router.finish(out.pop(data.draw(st.integers(0, len(out) - 1))))
        else:
            loads, matches = router.loads, router.match(prompt)
            route = router.route(prompt, data.draw(st.integers(0, 3)))
            out.append(route)
            fit = [r for r in range(3) if loads[r] <= min(loads) + 3]
            best = max(matches[r] for r in fit)
            assert route.replica in fit and matches[route.replica] == best
            assert loads[route.replica] == min(loads[r] for r in fit if matches[r] == best)
        known = [held[r].union(*(o.keys for o in out if o.replica == r)) for r in range(3)]
        counts = [
            next((i for i, k in enumerate(as_bytes) if k not in s), len(as_bytes)) for s in known
        ]
        assert router.match(prompt) == counts
        assert router.loads == [sum(o.load for o in out if o.replica == r) for r in range(3)]


def test_keys_of_another_process_are_the_same_keys():
    router = PrefixRouter(2, max_imbalance=0)
    manager = quire.KVCacheManager(num_blocks=8, block_size=BLOCK)
    prompt = np.arange(4 * BLOCK + 1, dtype=np.int32)
    seq = manager.create(prompt)
    manager.step([seq], [len(prompt)])
    manager.commit([seq])
    router.stored(1, quire.chain_keys(prompt, BLOCK))
    assert router.match(quire.chain_keys(prompt, BLOCK))[1] * BLOCK == manager.match(prompt)


def test_refusals():
    with pytest.raises(ValueError, match="num_replicas: expected at least 1, got 0"):
        PrefixRouter(0, max_imbalance=1)
    for value in (-1, float("nan")):
        with pytest.raises(ValueError, match="max_imbalance: expected 0 or more"):
            PrefixRouter(1, max_imbalance=value)
    router = PrefixRouter(2, max_imbalance=1)
    route = router.route(keys(1))
    with pytest.raises(ValueError, match=r"route: load: expected 0 or more, got -1"):
        router.route(keys(1), load=-1)
    with pytest.raises(ValueError, match=r"keys: expected uint8 \[n, 32\], got int64 \[3\]"):
        router.route(np.arange(3))
    with pytest.raises(ValueError, match=r"keys\[1\]: expected 32 bytes, got b'x'"):
        router.stored(0, [bytes(32), b"x"])
    with pytest.raises(ValueError, match=r"removed: replica: expected one in \[0, 2\), got 2"):
        router.removed(2, keys(1))
    router.finish(route)
    with pytest.raises(ValueError, match="finish: route: expected one on its way"):
        router.finish(route)
    assert router.loads == [0, 0] and router.match(keys(1)) == [0, 0]
