# SPDX-License-Identifier: Apache-2.0
"""A whole inference engine around quire, in NumPy: continuous batching, paged KV cache, shared
prefixes. The model is one attention layer with random weights; a real one has more of the same."""

import numpy as np
import quire

VOCAB, HEADS, KV_HEADS, DIM, BLOCK = 500, 8, 2, 32, 16


class TinyModel:
    """Embedding -> attention over the cache -> logits."""

    def __init__(self, num_blocks: int, seed: int = 0) -> None:
        """Random weights, and a cache of `num_blocks` blocks."""
        rng = np.random.default_rng(seed)
        self.embedding = rng.standard_normal((VOCAB, 64), np.float32)
        self.wq, self.wk, self.wv, self.wo = (
            rng.standard_normal(shape, np.float32) / 8
            for shape in (
                (64, HEADS * DIM),
                (64, KV_HEADS * DIM),
                (64, KV_HEADS * DIM),
                (HEADS * DIM, 64),
            )
        )
        self.cache = quire.KVCache(1, num_blocks, BLOCK, KV_HEADS, DIM, "float32")
        self.attention = quire.Attention(
            num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype="float32", block_size=BLOCK
        )

    def step(self, batch) -> np.ndarray:
        """Computes a scheduled batch; returns the next token of each sequence that samples."""
        plan = self.attention.plan(batch.block_table, batch.seq_lens, batch.cu_seqlens_q)  # once
        x = self.embedding[batch.token_ids]
        x = x + np.sin(batch.positions[:, None] / 10.0 ** np.arange(0, 4, 1 / 16)).astype(
            np.float32
        )
        q, k, v = ((x @ w).reshape(len(x), -1, DIM) for w in (self.wq, self.wk, self.wv))
        k_cache, v_cache = self.cache.k(0), self.cache.v(0)  # a layer
        if len(batch.copies):
            quire.copy_blocks(k_cache, v_cache, batch.copies)
        quire.append_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        x = x + self.attention.run(plan, q, k_cache, v_cache).reshape(len(x), -1) @ self.wo
        last_rows = batch.cu_seqlens_q[1:][batch.sampling] - 1
        return (x[last_rows] @ self.embedding.T).argmax(axis=1).astype(np.int32)


def generate(prompts: list[np.ndarray], max_new_tokens: int, num_blocks: int) -> list[list[int]]:
    """Greedy continuations, however the scheduler had to batch, chunk or preempt."""
    manager = quire.KVCacheManager(num_blocks=num_blocks, block_size=BLOCK)
    scheduler = quire.Scheduler(manager, max_tokens_per_step=64)
    model = TinyModel(num_blocks)
    for prompt in prompts:
        scheduler.add(prompt, max_new_tokens)
    generated: list[list[int]] = [[] for _ in prompts]
    while (batch := scheduler.schedule()) is not None:
        sampled = model.step(batch)
        for index, token in zip(batch.sampling, sampled, strict=True):
            generated[batch.request_ids[index]].append(int(token))
        scheduler.commit(sampled)
    manager.validate()
    stats = manager.stats()
    print(f"prefix hits {stats.prefix_hit_tokens} tokens, {scheduler.num_preemptions} preemptions")
    return generated


if __name__ == "__main__":
    rng = np.random.default_rng(1)
    system_prompt = rng.integers(0, VOCAB, 100)
    prompts = [
        np.concatenate([system_prompt, rng.integers(0, VOCAB, n)]).astype(np.int32)
        for n in (5, 40, 90)
    ]
    roomy = generate(prompts, max_new_tokens=40, num_blocks=64)
    tight = generate(prompts, max_new_tokens=40, num_blocks=17)  # has to preempt
    assert roomy == tight, "the same tokens, whatever the scheduler did"
    print(*roomy, sep="\n")
