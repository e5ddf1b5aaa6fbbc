# SPDX-License-Identifier: Apache-2.0
"""Where a call goes that can't simply be passed to the bindings: torch.compile and JAX.

Neither framework is imported here before its user has done so.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

from . import _core

P = ParamSpec("P")
R = TypeVar("R")


_NOT_JAX: set[type] = {np.ndarray}  # and torch.Tensor, once one has come along: the short way


def kernels() -> Any:
    """The bindings; torch operators of the same signatures while torch.compile traces."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        from .integrations import torch_ops

        return torch_ops
    return _core


def _in_jax(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for option in ("out", "lse", "stream"):
        if kwargs.pop(option, None) is not None:
            raise ValueError(f"{name}: {option}: expected None with JAX arrays")
    for option in ("k_scale", "v_scale"):
        scale = kwargs.pop(option, 1.0)
        if not isinstance(scale, (int, float)) or scale != 1:
            raise NotImplementedError(f"{name}: {option}: expected 1.0 with JAX arrays")
    return getattr(importlib.import_module("quire.integrations.jax"), name)(*args, **kwargs)


def functional_in_jax(function: Callable[P, R]) -> Callable[P, R]:
    """The function, and that of its name in `quire.integrations.jax` for a first argument of JAX's.

    There `out`, `lse` and `stream` must be None and scales 1: JAX makes the outputs itself.
    """
    name = function.__name__
    first_parameter = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if args and type(args[0]) in _NOT_JAX:
            return function(*args, **kwargs)
        first = args[0] if args else kwargs.get(first_parameter)
        if isinstance(first, (list, tuple)) and first:
            first = first[0]
        if not type(first).__module__.startswith("jax"):
            if type(first).__module__ == "torch":
                _NOT_JAX.add(type(first))
            return function(*args, **kwargs)
        result: R = _in_jax(name, args, kwargs)
        return result

    return call
