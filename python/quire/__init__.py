# SPDX-License-Identifier: Apache-2.0
"""quire: a framework-neutral runtime for attention over paged KV caches."""

from ._backward import attention_backward
from ._cache_ops import Rope, append_kv, apply_rope, copy_blocks, swap_blocks
from ._call_log import RecordedKVCacheManager
from ._core import (
    Attention,
    AttentionPlan,
    CacheEvent,
    FileStore,
    HostStore,
    KVCacheManager,
    KVStore,
    KVTicket,
    KVTransfer,
    LayerGroup,
    PreemptionCosts,
    Scheduler,
    capabilities,
    chain_keys,
    cpu_isa,
    cuda_state,
    export_blocks,
    import_blocks,
    num_threads,
    pair_ranges,
    replay_calls,
    set_num_threads,
    supported_cpu_isas,
)
from ._embed import get_cmake_dir, get_include
from ._kv_cache import KVCache
from ._kv_tiers import KVTiers
from ._ops import attention, merge_states, paged_attention
from ._prometheus import prometheus
from ._stats import KVCacheStats

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "AttentionPlan",
    "CacheEvent",
    "FileStore",
    "HostStore",
    "KVCache",
    "KVCacheManager",
    "KVCacheStats",
    "KVStore",
    "KVTicket",
    "KVTiers",
    "KVTransfer",
    "LayerGroup",
    "PreemptionCosts",
    "RecordedKVCacheManager",
    "Rope",
    "Scheduler",
    "append_kv",
    "apply_rope",
    "attention",
    "attention_backward",
    "capabilities",
    "chain_keys",
    "copy_blocks",
    "cpu_isa",
    "cuda_state",
    "export_blocks",
    "get_cmake_dir",
    "get_include",
    "import_blocks",
    "merge_states",
    "num_threads",
    "paged_attention",
    "pair_ranges",
    "prometheus",
    "replay_calls",
    "set_num_threads",
    "supported_cpu_isas",
    "swap_blocks",
]
