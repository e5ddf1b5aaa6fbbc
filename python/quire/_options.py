# SPDX-License-Identifier: Apache-2.0
"""The options of attention that are no tensors: what the bindings refuse without a name."""

from __future__ import annotations

from numbers import Real
from typing import Any

INT32_MAX = 2**31 - 1


def is_tree(function: str, mask_kind: str) -> bool:
    """Whether masks are of trees; ValueError for a kind that is none."""
    if not isinstance(mask_kind, str) or mask_kind not in ("full", "tree"):
        raise ValueError(f'{function}: mask_kind: expected "full" or "tree", got {mask_kind!r}')
    return mask_kind == "tree"


def refuse_wrong_type(
    function: str, causal: object, window: Any, scale: object, softcap: object
) -> None:
    """TypeError, or ValueError for a window out of range, that names the first wrong option.

    For calls that the bindings have refused already: they tell all types but no name.
    """

    def wrong(name: str, expected: str, value: object) -> TypeError:
        return TypeError(
            f"{function}: {name}: expected {expected}, got {value!r} ({type(value).__name__})"
        )

    if not isinstance(causal, bool):
        raise wrong("causal", "True or False", causal)
    try:
        is_pair = len(window) == 2 and all(hasattr(side, "__index__") for side in window)
    except TypeError:
        is_pair = False
    if not is_pair:
        raise wrong("window", "(left, right), two ints", window)
    if not all(-1 <= side <= INT32_MAX for side in window):
        raise ValueError(
            f"{function}: window: expected (left, right), each 0 to {INT32_MAX} or -1 for open, "
            f"got {window!r}"
        )
    if scale is not None and not isinstance(scale, Real):
        raise wrong("scale", "a number or None", scale)
    if not isinstance(softcap, Real):
        raise wrong("softcap", "a number", softcap)
