# SPDX-License-Identifier: Apache-2.0
"""Where a call goes that can't simply be passed to the bindings: torch.compile and JAX.

Neither framework is imported here before its user has done so.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from . import _core

P = ParamSpec("P")
R = TypeVar("R")


def kernels() -> Any:
    """The bindings; torch operators of the same signatures while torch.compile traces."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        from .integrations import torch_ops

        return torch_ops
    return _core


def functional_in_jax(function: Callable[P, R]) -> Callable[P, R]:
    """The function, and that of its name in `quire.integrations.jax` for a first argument of JAX's.

    There `out`, `lse` and `stream` must be None and scales 1: JAX makes the outputs itself.
    """
    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, (list, tuple)) and first:
            first = first[0]
        if not type(first).__module__.startswith("jax"):
            return function(*args, **kwargs)
        for option, none in (("out", None), ("lse", None), ("stream", None)):
            if kwargs.pop(option, none) is not None:
                raise ValueError(f"{name}: {option}: expected None with JAX arrays")
        for option in ("k_scale", "v_scale"):
            if kwargs.pop(option, 1.0) != 1.0:
                raise NotImplementedError(f"{name}: {option}: expected 1.0 with JAX arrays")
        own = getattr(importlib.import_module("quire.integrations.jax"), name)
        result: R = own(*args, **kwargs)
        return result

    return call
