# SPDX-License-Identifier: Apache-2.0
"""New arrays in the framework of an argument: outputs come back as what `q` is."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Tensor = Any  # NumPy array, torch tensor, or any object with __dlpack__


def numpy_dtype(name: str, argument: str) -> np.dtype[Any]:
    """NumPy's type for a float dtype or a quantised one; some are of ml_dtypes."""
    if name in ("float32", "float16", "int8"):
        return np.dtype(name)
    of_ml_dtypes = {
        "bfloat16": "bfloat16",
        "float8_e4m3": "float8_e4m3fn",
        "float8_e5m2": "float8_e5m2",
    }
    if name in of_ml_dtypes:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, of_ml_dtypes[name]))
        return found
    raise ValueError(
        f'{argument}: expected "float32", "float16", "bfloat16", "float8_e4m3", "float8_e5m2" or '
        f'"int8", got {name!r}'
    )


def empty(like: Tensor, argument: str, shape: tuple[int, ...], dtype: str | None = None) -> Tensor:
    """An uninitialised array on the device of `like`; dtype None is that of outputs of `like`.

    `argument` is what the error calls `like`: "attention: q".
    """
    if isinstance(like, np.ndarray):
        # A name takes as long as the rest of a call: it is asked for where it can matter.
        if dtype is None and like.dtype.itemsize == 1 and like.dtype.name == "float8_e4m3fn":
            return np.empty(shape, numpy_dtype("bfloat16", argument))
        return np.empty(shape, dtype or like.dtype)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        if dtype is None and like.dtype is torch.float8_e4m3fn:
            dtype = "bfloat16"
        return like.new_empty(shape, dtype=getattr(torch, dtype) if dtype else None)
    raise TypeError(
        f"{argument}: expected a NumPy array or a torch tensor where no output is given, got "
        f"{type(like).__name__}"
    )


def shape_of(tensor: Tensor, argument: str) -> tuple[int, ...]:
    """The shape of an argument; TypeError naming it if it has none."""
    try:
        return tuple(tensor.shape)
    except AttributeError:
        raise TypeError(
            f"{argument}: expected a NumPy array or an object with __dlpack__, got "
            f"{type(tensor).__name__}"
        ) from None


def empty_out(q: Tensor, head_dim_v: int) -> Tensor:
    """What `Attention.run` writes to: uninitialised, contiguous, q's rows and device."""
    shape = shape_of(q, "Attention.run: q")
    return empty(q, "Attention.run: q", (*shape[:-1], head_dim_v))


def stack(parts: Tensor | list[Tensor] | tuple[Tensor, ...], argument: str) -> Tensor:
    """A list of arrays as one array with a new first dimension; an array is returned as it is."""
    if not isinstance(parts, (list, tuple)):
        return parts
    if not parts:
        raise ValueError(f"{argument}: expected at least one state, got none")
    kinds = [(shape_of(part, f"{argument}[{i}]"), part.dtype) for i, part in enumerate(parts)]
    for i, (shape, dtype) in enumerate(kinds):
        if (shape, dtype) != kinds[0]:
            raise ValueError(
                f"{argument}[{i}]: expected {kinds[0][0]} {kinds[0][1]} as the first one, got "
                f"{shape} {dtype}"
            )
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(parts[0], torch.Tensor):
        return torch.stack(list(parts))
    return np.stack(parts)
