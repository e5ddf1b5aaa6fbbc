# SPDX-License-Identifier: Apache-2.0
"""Continuous batching over the ring buffers of sliding windows: prompts in chunks that overwrite
what they still see, beside decoding sequences; the tokens and the logits of eager attention."""

from __future__ import annotations

import copy

import pytest
import torch
from quire.integrations.transformers import continuous, enable
from small_models import SMALL
from transformers import (
    ContinuousBatchingConfig,
    Gemma2Config,
    GenerationConfig,
    GptOssConfig,
    MistralConfig,
)
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

PAGE_SIZE = 8
LENGTHS = (5, 100, 33, 61)  # the first decodes while the others are still computed
NUM_NEW = 16


def make_models(kind: str, window: int):
    """The same model twice: with eager attention, and with quire's."""
    torch.manual_seed(0)
    config = {
        "mistral": lambda: MistralConfig(**SMALL, sliding_window=window),
        "gemma2": lambda: Gemma2Config(**SMALL, sliding_window=window, attn_logit_softcapping=20.0),
        "gpt_oss": lambda: GptOssConfig(
            **SMALL, sliding_window=window, num_local_experts=4, num_experts_per_tok=2
        ),
    }[kind]()
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    if kind == "gpt_oss":  # initialised to constants that hide the sinks
        for layer in eager.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return eager, enable(copy.deepcopy(eager))


def generate(model, max_batch_tokens: int) -> tuple[list[list[int]], list[tuple]]:
    """Prompts with what followed them; (position, token, logits) of the last row of each chunk."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 199, (n,), generator=generator).tolist() for n in LENGTHS]
    rows: list[tuple] = []

    def note(module, args, inputs, output):
        at = inputs["logits_indices"]
        positions, tokens = (inputs[name][0, at] for name in ("position_ids", "input_ids"))
        rows.extend(zip(positions.tolist(), tokens.tolist(), output.logits[0], strict=True))

    hook = model.register_forward_hook(note, with_kwargs=True)
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_SIZE, num_blocks=96, max_batch_tokens=max_batch_tokens
        ),
        progress_bar=False,
    )
    hook.remove()
    assert not any(output.error for output in outputs.values())
    found = [output.prompt_ids + output.generated_tokens for output in outputs.values()]
    assert sorted(ids[:-NUM_NEW] for ids in found) == sorted(prompts)
    return found, rows


@torch.no_grad()
def eager_logits(eager, sequences: list[list[int]]) -> dict[tuple[int, int], list[torch.Tensor]]:
    """By position and token, what a forward pass over whole sequences says comes next.

    It must be the token that was generated. Not the eager attention of continuous batching, which
    knows no softcap.
    """
    wanted: dict[tuple[int, int], list[torch.Tensor]] = {}
    for ids in sequences:
        logits = eager(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        assert logits[-NUM_NEW:].argmax(-1).tolist() == ids[-NUM_NEW:]
        assert logits.std() > 0.05, "the logits are too flat to tell anything"
        for position, row in enumerate(logits):
            wanted.setdefault((position, ids[position]), []).append(row)
    return wanted


@pytest.mark.parametrize(
    ("kind", "window", "max_batch_tokens"),
    [
        ("mistral", 16, 40),  # whole pages
        ("mistral", 17, 12),  # no block but of one token fills the ring
        ("mistral", 64, 40),  # more than a chunk
        ("gemma2", 20, 40),  # halves of pages
        ("gpt_oss", 20, 12),
    ],
)
def test_chunks_cross_the_window_in_place(kind, window, max_batch_tokens, monkeypatch):
    eager, ours = make_models(kind, window)
    steps = []
    plan = continuous.plan_step

    def watch(*args):
        steps.append(plan(*args))
        return steps[-1]

    def update(self, *args):
        raise AssertionError("keys were gathered")

    monkeypatch.setattr(continuous, "plan_step", watch)
    for allocator in (FullAttentionCacheAllocator, SlidingAttentionCacheAllocator):
        monkeypatch.setattr(allocator, "update", update)
    sequences, rows = generate(ours, max_batch_tokens)

    wanted = eager_logits(eager, sequences)
    assert len(rows) > len(LENGTHS) * NUM_NEW
    for position, token, got in rows:
        candidates = wanted[position, token]
        nearest = min(candidates, key=lambda logits: (logits - got).abs().max())
        torch.testing.assert_close(got, nearest, rtol=1e-4, atol=1e-4)
    num_rows = [[past.num_rows for past in step.past] for step in steps]
    assert any(len(found) > 1 and found[0] == 1 for found in num_rows), "a chunk beside decoding"
    assert max(map(max, filter(None, num_rows))) == min(max_batch_tokens, window) - 1
