# SPDX-License-Identifier: Apache-2.0
"""Models of transformers with quire's attention: the logits and the tokens of eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import small_models
import torch
from quire.integrations.transformers import QuireCache, disable, enable
from transformers import (
    ContinuousBatchingConfig,
    Gemma2Config,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SMALL = {**small_models.SMALL, "num_hidden_layers": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=16),
    "gemma2": Gemma2Config(
        **SMALL, sliding_window=16, attn_logit_softcapping=20.0, query_pre_attn_scalar=16
    ),
    "gpt_oss": GptOssConfig(**SMALL, sliding_window=16, num_local_experts=4, num_experts_per_tok=2),
}
LENGTHS = (37, 5, 21)


@pytest.fixture(params=CONFIGS, scope="module")
def models(request):
    """The same model twice: with eager attention, and with quire's."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[request.param])
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    if request.param == "gpt_oss":  # initialised to constants that hide the sinks
        for layer in eager.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return eager, enable(copy.deepcopy(eager))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 199, (n,), generator=generator).tolist() for n in LENGTHS]


def padded() -> dict[str, torch.Tensor]:
    longest = max(LENGTHS)
    ids = [[0] * (longest - len(p)) + p for p in prompts()]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts()]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(model, inputs, **options) -> torch.Tensor:
    config = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0)
    return model.generate(**inputs, generation_config=config, **options)


@torch.no_grad()
def test_logits_of_a_padded_batch(models):
    eager, ours = models
    inputs = padded()
    wanted, got = (model(**inputs, use_cache=False).logits for model in models)
    held = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[held], wanted[held], rtol=1e-4, atol=1e-4)
    first = wanted[0, -1]
    assert first.std() > 0.05, "the logits are too flat to tell anything"


@torch.no_grad()
def test_attention_matters(models):
    """Without their past, the last rows differ: the other tests can fail."""
    eager, _ = models
    ids = torch.tensor([prompts()[0]])
    alone = eager(ids[:, -1:]).logits[0, -1]
    whole = eager(ids).logits[0, -1]
    assert (alone - whole).abs().max() > 0.05


@torch.no_grad()
def test_logits_step_by_step_through_pages(models):
    """A prompt in two chunks and single tokens, through the paged cache."""
    eager, ours = models
    inputs = padded()
    cache = QuireCache(ours, max_tokens=512, block_size=8)
    wanted = eager(**inputs, use_cache=False).logits
    held = inputs["attention_mask"].bool()
    positions = (held.cumsum(1) - 1).clamp(min=0)
    begin = 0
    for end in (20, 34, 35, 36, 37):
        got = ours(
            input_ids=inputs["input_ids"][:, begin:end],
            attention_mask=inputs["attention_mask"][:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
        ).logits
        rows = held[:, begin:end]
        torch.testing.assert_close(got[rows], wanted[:, begin:end][rows], rtol=1e-4, atol=1e-4)
        begin = end
    assert cache.get_seq_length() == 37
    cache.manager.commit(cache.sequences)
    assert [seq.num_computed_tokens for seq in cache.sequences] == list(LENGTHS)


def test_generate_gives_the_tokens_of_eager(models):
    eager, ours = models
    wanted = generate(eager, padded())
    assert wanted.shape[1] == max(LENGTHS) + 12
    torch.testing.assert_close(generate(ours, padded()), wanted)
    cache = QuireCache(ours, max_tokens=512, block_size=4)
    torch.testing.assert_close(generate(ours, padded(), past_key_values=cache), wanted)
    cache.manager.validate()


def test_beams_share_their_blocks(models):
    eager, ours = models
    wanted = generate(eager, padded(), num_beams=3)
    cache = QuireCache(ours, max_tokens=1024, block_size=4)
    torch.testing.assert_close(generate(ours, padded(), num_beams=3, past_key_values=cache), wanted)
    alone = 3 * sum(-(-(n + 11) // 4) for n in LENGTHS)
    assert 0 < cache.manager.stats().used_blocks < alone
    cache.reset()
    assert cache.manager.stats().used_blocks == 0


def test_crop_forgets_the_last_tokens(models):
    _, ours = models
    ids = torch.tensor([prompts()[0]])
    cache = QuireCache(ours, max_tokens=256, block_size=4)
    with torch.no_grad():
        ours(ids, past_key_values=cache)
        cache.crop(5)
        again = ours(ids[:, -5:], past_key_values=cache).logits
        torch.testing.assert_close(again, ours(ids).logits[:, -5:], rtol=1e-4, atol=1e-4)


def continuous_batching(model, **options) -> list[list[int]]:
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(
        page_size=8, num_blocks=64, max_batch_tokens=48, auto_switch_to_flash=True, **options
    )
    shared = prompts() + [prompts()[0][:30] + prompts()[2]]
    outputs = model.generate_batch(
        shared, generation_config=config, continuous_batching_config=batching, progress_bar=False
    )
    return [outputs[key].generated_tokens for key in sorted(outputs, key=lambda k: k)]


@pytest.fixture
def gathering_fails(monkeypatch) -> Callable[[], None]:
    """Call it, and no allocator of transformers hands out copies of keys any more."""

    def update(self, *args):
        raise AssertionError("keys were gathered")

    def refuse():
        for kind in (FullAttentionCacheAllocator, SlidingAttentionCacheAllocator):
            monkeypatch.setattr(kind, "update", update)

    return refuse


def test_continuous_batching_gives_the_tokens_of_eager(models, gathering_fails):
    eager, ours = models
    wanted = continuous_batching(copy.deepcopy(eager))
    assert all(len(tokens) == 12 for tokens in wanted)
    gathering_fails()
    assert continuous_batching(ours) == wanted


def test_enable_and_disable(models):
    _, ours = models
    model = copy.deepcopy(ours)
    assert enable(model).config._attn_implementation == "quire_flash"
    disable(disable(model))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="QuireCache: model: expected one after enable"):
        QuireCache(model)


def test_refusals(models):
    _, ours = models
    with pytest.raises(NotImplementedError, match="no_grad"):
        ours(torch.tensor([[1, 2, 3]]))
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of blocks: expected at most 16"):
        ours(torch.tensor([prompts()[0]]), past_key_values=QuireCache(ours, max_tokens=16))
