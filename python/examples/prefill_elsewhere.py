# SPDX-License-Identifier: Apache-2.0
"""Prefill in one process, decode in another: the KV blocks go from cache to cache through NIXL.

    pip install nixl-cu12
    python prefill_elsewhere.py

The decoding process says where its blocks lie, the prefilling one writes into them. The tokens and
the bits of the attention's outputs are those of one process that does both.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection

import numpy as np
import quire

LAYERS, HEADS, KV_HEADS, DIM, BLOCK, VOCAB = 2, 8, 2, 32, 16, 500
NUM_BLOCKS = 64
PROMPT = np.random.default_rng(7).integers(0, VOCAB, 700).astype(np.int32)
NEW_TOKENS = 20


class Engine:
    """A small model with random weights, equal in every process, and its cache."""

    def __init__(self) -> None:
        """Draw the weights."""
        rng = np.random.default_rng(0)
        width = HEADS * DIM
        self.embedding = rng.standard_normal((VOCAB, width), np.float32)
        self.wqkv = rng.standard_normal((LAYERS, width, (HEADS + 2 * KV_HEADS) * DIM), np.float32)
        self.head = rng.standard_normal((width, VOCAB), np.float32)
        self.manager = quire.KVCacheManager(NUM_BLOCKS, BLOCK)
        self.cache = quire.KVCache(LAYERS, NUM_BLOCKS, BLOCK, KV_HEADS, DIM, "float32")
        self.attention = quire.Attention(
            num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype="float32", block_size=BLOCK
        )

    def forward(self, batch, tokens: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns the last token's output [HEADS * DIM], and the next token."""
        plan = self.attention.plan(batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
        x = self.embedding[tokens]
        for layer in range(LAYERS):
            # One token at a time, so that the bits of a product depend on its own row only.
            qkv = np.stack([row @ self.wqkv[layer] for row in x]).reshape(len(x), -1, DIM) / 16
            q, k, v = np.split(qkv, [HEADS, HEADS + KV_HEADS], axis=1)
            k_cache, v_cache = self.cache.k(layer), self.cache.v(layer)
            quire.append_kv(k, v, k_cache, v_cache, batch.slot_mapping)
            x = x + self.attention.run(plan, q, k_cache, v_cache).reshape(len(x), -1)
        return x[-1], int((x[-1] @ self.head).argmax())

    def decode(self, seq, count: int) -> tuple[list[int], np.ndarray]:
        """The next `count` tokens, and the outputs they came from [count, HEADS * DIM]."""
        tokens, outputs = [], []
        for _ in range(count):
            batch = self.manager.step([seq], [1])
            output, token = self.forward(batch, seq.token_ids[-1:])
            self.manager.commit([seq], np.array([token], np.int32))
            tokens.append(token)
            outputs.append(output)
        return tokens, np.stack(outputs)

    def prefill(self, prompt: np.ndarray) -> tuple:
        """Computes a prompt; returns its sequence and the first new token."""
        seq = self.manager.create(prompt)
        batch = self.manager.step([seq], [len(prompt)])
        _, token = self.forward(batch, prompt)
        self.manager.commit([seq], np.array([token], np.int32))
        return seq, token


def connect(name: str, cache: quire.KVCache):
    """A NIXL agent of this process that may read and write the cache."""
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    agent.register_memory(on_cpu(quire.export_blocks(cache.pools, list(range(NUM_BLOCKS)))), "DRAM")
    return agent


def on_cpu(ranges: np.ndarray) -> np.ndarray:
    """Ranges (address, bytes) as NIXL wants them: with a device number."""
    return np.ascontiguousarray(np.insert(ranges, 2, 0, axis=1))


def prefill_process(pipe: Connection) -> None:
    """Computes the prompt, writes its KV where the other process wants it, and says so."""
    engine = Engine()
    seq, token = engine.prefill(PROMPT)
    agent = connect("prefill", engine.cache)
    metadata, wanted = pipe.recv()
    there = agent.add_remote_agent(metadata)
    blocks = seq.block_table[: -(-len(PROMPT) // BLOCK)]
    pieces = quire.pair_ranges(quire.export_blocks(engine.cache.pools, blocks), wanted)
    transfer = agent.initialize_xfer(
        "WRITE",
        agent.get_xfer_descs(on_cpu(pieces[:, [0, 2]]), "DRAM"),
        agent.get_xfer_descs(on_cpu(pieces[:, [1, 2]]), "DRAM"),
        there,
        b"written",
    )
    state = agent.transfer(transfer)
    while state == "PROC":
        time.sleep(0.001)
        state = agent.check_xfer_state(transfer)
    pipe.send((state, token, len(pieces), int(pieces[:, 2].sum())))
    pipe.recv()  # the other end is done with this one
    agent.release_xfer_handle(transfer)


def decode_process(pipe: Connection) -> tuple[list[int], np.ndarray]:
    """Decodes on blocks that another process has written."""
    engine = Engine()
    agent = connect("decode", engine.cache)
    # Others come and go: the free blocks do not lie side by side.
    others = [engine.manager.create(np.full(5, i, np.int32)) for i in range(12)]
    engine.manager.step(others, [5] * len(others))
    engine.manager.free(others[::2])
    # Slots for the prompt, then a token more, which is the first to be computed here.
    seq = engine.manager.create(PROMPT)
    batch = engine.manager.step([seq], [len(PROMPT)])
    wanted = quire.import_blocks(engine.cache.pools, batch.block_table[0])
    pipe.send((agent.get_agent_metadata(), wanted))
    state, token, num_pieces, num_bytes = pipe.recv()
    assert state == "DONE", state
    while not agent.check_remote_xfer_done("prefill", b"written"):
        time.sleep(0.001)
    print(f"{num_bytes} bytes of KV in {num_pieces} pieces")
    engine.manager.commit([seq], np.array([token], np.int32))
    result = engine.decode(seq, NEW_TOKENS)
    pipe.send("done")
    return result


def main() -> None:
    """Both ways, and their outputs compared bit by bit."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=prefill_process, args=(there,), daemon=True)
    child.start()
    there.close()  # so that recv() ends if the child does
    tokens, outputs = decode_process(here)
    child.join()

    engine = Engine()
    seq, _ = engine.prefill(PROMPT)
    expected_tokens, expected_outputs = engine.decode(seq, NEW_TOKENS)
    assert tokens == expected_tokens
    assert outputs.tobytes() == expected_outputs.tobytes()
    print(f"the same bits as in one process; tokens {tokens}")


if __name__ == "__main__":
    main()
