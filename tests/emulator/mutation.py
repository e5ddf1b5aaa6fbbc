# SPDX-License-Identifier: Apache-2.0
"""A change of one place of the kernels' source; see mutations.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    what: str
    file: str
    old: str
    new: str
