# SPDX-License-Identifier: Apache-2.0
"""Kernels are written in the primitives of cuda/prim alone: what goes around them would be
untested, since the emulator would never see it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "cuda"
KERNELS = sorted((CUDA / "kernels").rglob("*.h"))
PRIMITIVES = sorted((CUDA / "prim").glob("*"))

FORBIDDEN = {
    "built-in variable": r"\b(threadIdx|blockIdx|blockDim|gridDim|warpSize)\b",
    "shared variable": r"__shared__|\bextern\b",
    "intrinsic": r"\b__(?!restrict__|builtin)\w+",
    "inline PTX": r"\basm\b",
    "standard library": r"\bstd::",
    "allocation": r"\b(new|malloc|free|delete)\b(?!;)",
    "CUDA type": r"\b(half2?|nv_bfloat162?|float2|float4|int2|int4|uint2|uint4|dim3)\b",
    "preprocessor branch": r"^\s*#\s*(if|ifdef|ifndef|else|define)\b",
}
INCLUDES = re.compile(r'^\s*#\s*include\s*([<"].*[>"])', re.MULTILINE)


def code_of(path: Path) -> str:
    text = re.sub(r'"(?:\\.|[^"\\\n])*"', '""', path.read_text())
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
@pytest.mark.parametrize("what", FORBIDDEN)
def test_kernels_use_primitives_only(path, what):
    found = re.search(FORBIDDEN[what], code_of(path), re.MULTILINE)
    assert not found, f"{path.name}: {what} {found and found.group()}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_include_primitives_and_parameters_only(path):
    for name in INCLUDES.findall(path.read_text()):
        assert re.match(
            r'"(prim|kernels(/sm90)?)/\w+\.h"$|"quire/kernel_params\.h"$|<cstdint>$', name
        ), name


@pytest.mark.parametrize("path", PRIMITIVES, ids=lambda p: p.name)
def test_a_primitive_has_both_sides(path):
    """A function with inline PTX and nothing for the host, or the reverse, could not be tested."""
    if path.name == "types.h":
        return
    for body in re.split(r"\nQUIRE_DEVICE |\ntemplate <", path.read_text())[1:]:
        body = body.split("\n}\n")[0]
        assert ("asm" in body or "__CUDACC__" in body) == ("#else" in body), body[:200]
