# SPDX-License-Identifier: Apache-2.0
"""Attention in float64, one sequence at a time, written to be obviously right; and the same
computation done naively in a low precision, which sets the tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Options:
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: np.ndarray | None = None  # [num_heads]
    sinks: np.ndarray | None = None  # [num_heads]


def visible(q_len: int, seq_len: int, options: Options, mask: np.ndarray | None) -> np.ndarray:
    """bool [q_len, seq_len]; `mask` bool of that shape, or None."""
    position = seq_len - q_len + np.arange(q_len)[:, None]
    key = np.arange(seq_len)[None, :]
    seen = np.ones((q_len, seq_len), bool)
    if options.causal:
        seen &= key <= position
    left, right = options.window
    if left >= 0:
        seen &= key >= position - left
    if right >= 0:
        seen &= key <= position + right
    if mask is not None:
        seen &= mask
    return seen


def _logits(q, k, options: Options) -> np.ndarray:
    """[num_heads, q_len, seq_len] before the mask; q [q_len, num_heads, d], k [seq_len, kv, d]."""
    (q_len, num_heads, head_dim), seq_len = q.shape, k.shape[0]
    k = np.repeat(k, num_heads // k.shape[1], axis=1)
    scale = 1 / np.sqrt(head_dim) if options.scale is None else options.scale
    x = np.einsum("ihd,jhd->hij", q, k) * scale
    if options.softcap:
        x = options.softcap * np.tanh(x / options.softcap)
    if options.alibi_slopes is not None:
        distance = np.abs(np.arange(q_len)[:, None] + seq_len - q_len - np.arange(seq_len)[None])
        x = x - options.alibi_slopes[:, None, None] * distance
    return x


def attend(q, k, v, options: Options, mask=None) -> tuple[np.ndarray, np.ndarray]:
    """One sequence in float64 -> out [q_len, num_heads, dv], lse [num_heads, q_len]."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    (q_len, num_heads, _), seq_len = q.shape, k.shape[0]
    seen = visible(q_len, seq_len, options, mask)
    x = np.where(seen[None], _logits(q, k, options), -np.inf)
    any_seen = seen.any(axis=1)  # [q_len]
    top = np.where(any_seen, x.max(axis=2, initial=-np.inf), 0)  # [num_heads, q_len]
    p = np.where(seen[None], np.exp(x - top[..., None]), 0)
    denominator = p.sum(axis=2)
    if options.sinks is not None:
        denominator = denominator + np.exp(options.sinks[:, None].astype(np.float64) - top)
    v = np.repeat(v, num_heads // v.shape[1], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.einsum("hij,jhd->ihd", p / denominator[..., None], v)
        lse = top + np.log(denominator)
    return np.where(any_seen[:, None, None], out, 0), np.where(any_seen, lse, -np.inf)


def attend_naively(q, k, v, options: Options, mask=None) -> np.ndarray:
    """The same with logits, probabilities and output each rounded to q's dtype."""
    dtype = q.dtype

    def rounded(x):
        return x.astype(dtype).astype(np.float32)

    q32, k32, v32 = (np.asarray(x).astype(np.float32) for x in (q, k, v))
    seen = visible(q.shape[0], k.shape[0], options, mask)
    x = np.where(seen[None], rounded(_logits(q32, k32, options).astype(np.float32)), -np.inf)
    top = np.where(seen.any(axis=1), x.max(axis=2, initial=-np.inf), 0)
    p = np.where(seen[None], np.exp(x - top[..., None]), 0).astype(np.float32)
    denominator = p.sum(axis=2)
    if options.sinks is not None:
        denominator = denominator + np.exp(options.sinks[:, None] - top)
    denominator = np.where(seen.any(axis=1), denominator, 1)
    v32 = np.repeat(v32, q.shape[1] // v.shape[1], axis=1)
    return rounded(np.einsum("hij,jhd->ihd", rounded(p / denominator[..., None]), v32))


def attend_backward(dout, q, k, v, options: Options, mask=None) -> tuple[np.ndarray, ...]:
    """One sequence in float64 -> dq, dk, dv, dsinks (zeros without sinks)."""
    dout, q, k, v = (np.asarray(x).astype(np.float64) for x in (dout, q, k, v))
    (q_len, num_heads, head_dim), (seq_len, kv_heads, _) = q.shape, k.shape
    group = num_heads // kv_heads
    scale = 1 / np.sqrt(head_dim) if options.scale is None else options.scale
    seen = visible(q_len, seq_len, options, mask)
    out, lse = attend(q, k, v, options, mask)
    x = _logits(q, k, options)
    with np.errstate(invalid="ignore"):
        p = np.where(seen[None], np.exp(x - lse[..., None]), 0)  # [num_heads, q_len, seq_len]
    every_k, every_v = (np.repeat(a, group, axis=1) for a in (k, v))
    delta = np.einsum("ihd,ihd->hi", dout, out)
    ds = p * (np.einsum("ihd,jhd->hij", dout, every_v) - delta[..., None])
    if options.softcap:
        raw = np.einsum("ihd,jhd->hij", q, every_k) * scale
        ds = ds * (1 - np.tanh(raw / options.softcap) ** 2)
    dq = np.einsum("hij,jhd->ihd", ds, every_k) * scale
    dk = np.einsum("hij,ihd->jhd", ds, q) * scale
    dv = np.einsum("hij,ihd->jhd", p, dout)
    dk, dv = (a.reshape(seq_len, kv_heads, group, a.shape[-1]).sum(axis=2) for a in (dk, dv))
    dsinks = np.zeros(num_heads)
    if options.sinks is not None:
        some = seen.any(axis=1)
        probability = np.exp(options.sinks[:, None].astype(np.float64) - lse[:, some])
        dsinks = -(probability * delta[:, some]).sum(axis=1)
    return dq, dk, dv, dsinks
