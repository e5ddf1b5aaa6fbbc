# SPDX-License-Identifier: Apache-2.0
"""Continuous batching with its blocks and prefixes in a KVCacheManager: transformers' tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from quire.integrations.transformers import enable, managed_cache
from quire.integrations.transformers.managed_cache import ManagedCache
from small_models import SMALL
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, MistralConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.models.auto.modeling_auto import AutoModelForCausalLM


def make_models(config):
    """The same model twice: with eager attention, and with quire's."""
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    return eager, enable(copy.deepcopy(eager))


@pytest.fixture(scope="module")
def models():
    return make_models(LlamaConfig(**SMALL))


@pytest.fixture
def caches(monkeypatch) -> list[PagedAttentionCache]:
    """The caches that quire's factory makes."""
    made = []
    original = managed_cache.make_cache

    def note(*args, **options):
        made.append(original(*args, **options))
        return made[-1]

    monkeypatch.setattr(managed_cache.continuous_api, "PagedAttentionCache", note)
    return made


def draw(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 199, (count,), generator=generator).tolist()


def prompts() -> list[list[int]]:
    """A system prompt that ends inside a block of 8 before questions, and a prompt of its own."""
    return [draw(37, 0) + draw(n, n) for n in (3, 9, 14, 22)] + [draw(19, 1)]


def generate(model, batch=None, num_blocks=64, max_batch_tokens=64, **options) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=12, eos_token_id=-1, pad_token_id=0, **options)
    batching = ContinuousBatchingConfig(
        page_size=8, num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, cpu_offload_space=0
    )
    outputs = model.generate_batch(
        batch or prompts(),
        generation_config=config,
        continuous_batching_config=batching,
        progress_bar=False,
    )
    assert not any(output.error for output in outputs.values())
    return [outputs[key].generated_tokens for key in sorted(outputs)]


def assert_nothing_leaks(cache: ManagedCache) -> None:
    assert not cache.sequences
    cache.manager.validate()
    assert cache.manager.num_used_blocks == 0
    assert cache.compute_free_capacity() == 1


def test_same_tokens_and_a_shared_prompt_is_computed_once(models, caches, monkeypatch):
    eager, ours = models
    wanted = generate(eager)
    assert not isinstance(caches.pop(), ManagedCache)
    assert all(len(tokens) == 12 for tokens in wanted)

    computed = []
    original = ManagedCache.begin_step

    def watch(cache):
        batch = original(cache)
        computed.append(int(batch.cu_seqlens_q[-1]))
        return batch

    monkeypatch.setattr(ManagedCache, "begin_step", watch)
    assert generate(ours) == wanted
    (cache,) = caches
    hits = cache.manager.stats()["prefix_hit_tokens"]
    num_decoded = 11 * len(prompts())  # the last token of each is never computed
    assert sum(computed) == sum(map(len, prompts())) + num_decoded - hits
    assert hits >= 2 * 37 and hits % 8, "hits end inside a block of 8"
    assert_nothing_leaks(cache)


def test_same_tokens_over_transformers_own_blocks(models, caches, monkeypatch):
    eager, ours = models
    monkeypatch.setattr(managed_cache, "is_manageable", lambda *args: False)
    assert generate(ours) == generate(eager)
    assert not any(isinstance(cache, ManagedCache) for cache in caches)


def test_out_of_blocks_requests_begin_anew(models, caches):
    """Blocks for two of the five: the others wait, or are reset and find their own prefix."""
    eager, ours = models
    batch = [draw(30, seed) for seed in range(5)]
    wanted = generate(eager, batch)
    assert generate(ours, batch, num_blocks=11) == wanted
    cache = caches[-1]
    assert cache.manager.stats()["evicted_blocks"] > 0
    assert_nothing_leaks(cache)


def test_children_share_the_prompt(models, caches):
    """Three samples each, of one candidate: the tokens are the greedy ones. The last prompt is
    cached but for the token that its children are to begin with."""
    eager, ours = models
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    batch = [*prompts()[1:3], prompts()[1]]
    got = generate(ours, batch, max_batch_tokens=48, **options)
    assert got == [tokens for tokens in generate(eager, batch) for _ in range(3)]
    assert_nothing_leaks(caches[0])


def test_layers_with_a_window_keep_transformers_blocks(caches):
    eager, ours = make_models(MistralConfig(**SMALL, sliding_window=16))
    assert generate(ours) == generate(eager)
    assert not any(isinstance(cache, ManagedCache) for cache in caches)


def test_other_attention_over_the_cache_is_refused(models, caches):
    generate(models[1])
    with pytest.raises(RuntimeError, match="expected the attention 'quire_flash'"):
        caches[0].update(None, None, 0, {})
