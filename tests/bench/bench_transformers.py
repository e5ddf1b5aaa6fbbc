# SPDX-License-Identifier: Apache-2.0
"""Continuous batching of transformers: attention by quire against transformers' own on the CPU.

    python tests/bench/bench_transformers.py

One model (from a config, random weights, float32), the same batch, three implementations that
alternate in one run: quire, "sdpa" and "paged|eager". Timed are the attention part, which is the
calls of the attention function with cache update and gathering, and where a case has several equal
steps, the whole step: from one first layer to the next, with scheduling, dense masks and the rest
of the model. Two cases: packing the prompts of one step (2,048 tokens in 8 requests), and decode
steps of 8 requests with 512 tokens each.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from quire.integrations.transformers import enable
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

IMPLEMENTATIONS = ("quire_flash", "sdpa", "paged|eager")
Calls = list[tuple[int, float, float]]  # (query rows, begin, end) of each attention call, seconds


@contextmanager
def timed(name: str, calls: Calls) -> Iterator[None]:
    """Notes every call of an implementation's attention function."""
    original: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = original(module, query, *args, **kwargs)
        calls.append((query.shape[2], begin, time.perf_counter()))
        return result

    AttentionInterface.register(name, attention)
    try:
        yield
    finally:
        AttentionInterface.register(name, original)


def run(model: Any, prompts: list[list[int]], new_tokens: int) -> tuple[Calls, list[list[int]]]:
    """One generate_batch; the calls of the attention function, and the tokens."""
    name = model.config._attn_implementation
    calls: Calls = []
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0
    )
    batching = ContinuousBatchingConfig(
        page_size=32, num_blocks=192, max_batch_tokens=2048, auto_switch_to_flash=False
    )
    with timed(name, calls), torch.no_grad():
        outputs = model.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=batching,
            progress_bar=False,
        )
    return calls, [outputs[key].generated_tokens for key in sorted(outputs)]


def median_step(calls: Calls, rows: int, num_layers: int) -> tuple[float, float | None]:
    """Median seconds, of the steps of `rows` query rows, in attention and in all.

    In all: between the beginnings of two such steps; None where no two follow each other.
    """
    steps = [calls[i : i + num_layers] for i in range(0, len(calls), num_layers)]
    attention = [sum(end - begin for _, begin, end in s) for s in steps if s[0][0] == rows]
    pairs = itertools.pairwise(step[0] for step in steps)
    whole = [b[1] - a[1] for a, b in pairs if a[0] == b[0] == rows]
    return statistics.median(attention), statistics.median(whole) if whole else None


def report(case: str, medians: dict[str, list[tuple[float, float | None]]]) -> None:
    """A line for each implementation: medians over the rounds, and ratios to quire's."""
    for part, index in (("attention", 0), ("whole step", 1)):
        seconds = {
            name: statistics.median(found)
            for name, rounds in medians.items()
            if (found := [value[index] for value in rounds if value[index] is not None])
        }
        for name, value in seconds.items():
            ratio = value / seconds["quire_flash"]
            print(f"{case:16} {part:10} {name:12} {value * 1e3:9.2f} ms {ratio:7.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--case", choices=("prefill", "decode"), action="append")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        initializer_range=0.05,
        max_position_embeddings=4096,
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    models = {name: copy.deepcopy(base) for name in IMPLEMENTATIONS}
    enable(models["quire_flash"])
    if "paged|eager" not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register("paged|eager", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    for name in IMPLEMENTATIONS[1:]:
        models[name].config._attn_implementation = name

    cases = {"prefill 8 x 256": (256, 1, 2048), "decode 8 x 512": (512, 16, 8)}
    logging.disable()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.layers} layers of "
        "32/8 heads x 128, float32; medians over all rounds\n"
    )
    for case, (length, new_tokens, rows) in cases.items():
        if args.case and case.split()[0] not in args.case:
            continue
        generator = torch.Generator().manual_seed(length)
        prompts = [torch.randint(2, 512, (length,), generator=generator).tolist() for _ in range(8)]
        medians: dict[str, list[tuple[float, float | None]]] = {}
        tokens: dict[str, list[list[int]]] = {}
        for _ in range(args.rounds):
            for name in IMPLEMENTATIONS:
                calls, tokens[name] = run(models[name], prompts, new_tokens)
                medians.setdefault(name, []).append(median_step(calls, rows, args.layers))
        report(case, medians)
        for name in IMPLEMENTATIONS[1:]:
            same = sum(a == b for a, b in zip(tokens[name], tokens["quire_flash"], strict=True))
            print(f"{case:16} {same} of {len(prompts)} requests have the tokens of {name}\n")


if __name__ == "__main__":
    main()
