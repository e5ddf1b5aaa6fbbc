# SPDX-License-Identifier: Apache-2.0
"""The exposition text, read by Prometheus' own client."""

from __future__ import annotations

import numpy as np
import pytest
import quire

parser = pytest.importorskip("prometheus_client.parser")


def parsed(text: str) -> dict[str, tuple[str, str, dict[str, str], float]]:
    """Sample name -> type, help, labels, value."""
    return {
        sample.name: (family.type, family.documentation, sample.labels, sample.value)
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_count_of_a_manager():
    manager = quire.KVCacheManager(32, 4)
    seq = manager.create(np.arange(10, dtype=np.int32))
    manager.step([seq], [10])
    manager.commit([seq])
    stats = manager.stats()
    metrics = parsed(stats.prometheus())
    assert len(metrics) == len(stats._asdict())
    assert metrics["quire_kv_used_blocks"][::3] == ("gauge", 3)
    assert metrics["quire_kv_prefix_query_tokens_total"][::3] == ("counter", 10)
    for name, value in stats._asdict().items():
        kind, text, labels, got = (
            metrics.get(f"quire_kv_{name}") or metrics[f"quire_kv_{name}_total"]
        )
        assert got == value and labels == {} and kind in ("gauge", "counter")
        assert text.endswith("."), f"{name} has no help"


def test_every_count_of_a_store():
    stats = quire.HostStore(1 << 20, 1 << 10).stats()
    metrics = parsed(quire.prometheus(stats, prefix="quire_store"))
    assert metrics["quire_store_capacity_blocks"][3] == 1024
    assert all(text for _, text, _, _ in metrics.values()) and len(metrics) == len(stats)


def test_labels_are_escaped():
    labels = {"model": 'a "b" \\ c\nd', "rank": "0"}
    metrics = parsed(quire.prometheus({"free_blocks": 1, "new_count": 2.5}, labels=labels))
    assert metrics["quire_kv_free_blocks"][2] == labels
    assert metrics["quire_kv_new_count"] == ("gauge", "", labels, 2.5)


def test_refusals():
    with pytest.raises(ValueError, match="prometheus: prefix: expected letters"):
        quire.prometheus({}, prefix="a-b")
    with pytest.raises(ValueError, match="prometheus: labels: expected letters"):
        quire.prometheus({}, labels={"a b": "c"})
