# SPDX-License-Identifier: Apache-2.0
"""Gates on the compiled kernels: what ptxas made of each line of kernels.def, for every
architecture.

    python tests/cuda/gates.py BUILD/cuda [--write]

Reads the fatbinaries with cuobjdump (packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm; both
programs on PATH). Checks that every kernel is there, that the main kernels keep nothing in local
memory, and that tensor cores and asynchronous copies are used. The registers of every kernel and
the sizes of the images are compared with cuda/registers.csv, where the compiler is the one that
made that file; --write writes it instead, of a build of all kernels."""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "cuda" / "registers.csv"
OPCODES = ("HMMA.16816", "LDGSTS", "LDSM.16.M88", "LDSM.16.MT88")
# Of the kernels that are written for 90a and compiled for nothing else.
SM90_OPCODES = ("UTMALDG.4D", "LDGSTS", "SYNCS", "USETMAXREG")
SM90_PRODUCTS = ("HGMMA.64x", "QGMMA.64x")  # of 16-bit elements, of e4m3
# Of the kernels over e4m3, where there is an instruction for it: two codes to float16.
E4M3_OPCODE = "F2FP.F16.E4M3.UNPACK_B"


def expected_kernels(path: Path) -> list[str]:
    """The entry points that lines of kernels.def name: see cuda/entry.cuh."""
    lines = re.findall(r"^QUIRE_(\w+)\((.*)\)", path.read_text(), re.MULTILINE)
    return [f"{name.lower()}_{arguments.replace(', ', '_')}" for name, arguments in lines]


def is_for(kernel: str, arch: str) -> bool:
    if arch == "89":
        return kernel.startswith(("prefill_e4m3", "decode_e4m3"))
    return "_sm90_" not in kernel or arch == "90a"


def opcodes_of(kernel: str, arch: str) -> tuple[str, ...]:
    if "_sm90_" in kernel:
        return (SM90_PRODUCTS["_e4m3_" in kernel], *SM90_OPCODES)
    return (*OPCODES, E4M3_OPCODE) if "_e4m3_" in kernel and arch != "80" else OPCODES


def compiler() -> str:
    """ "nvcc 13.0.88", whose choices of registers are its own."""
    run = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", run.stdout)
    assert found, run.stdout
    return f"nvcc {found[1]}"


def cuobjdump(*arguments: str) -> list[str]:
    run = subprocess.run(["cuobjdump", *arguments], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def read_resources(path: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, architecture) -> registers a thread, bytes of stack."""
    resources, arch, kernel = {}, "", ""
    for line in cuobjdump("--dump-resource-usage", str(path)):
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+)", line):
            resources[kernel, arch] = int(match[1]), int(match[2])
    return resources


def read_opcodes(path: Path) -> dict[tuple[str, str], set[str]]:
    """(kernel, architecture) -> those opcodes that its code contains."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    arch, kernel = "", ""
    for line in cuobjdump("-sass", str(path)):
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            kernel = match[1]
        else:
            found[kernel, arch].update(
                opcode
                for opcode in (*OPCODES, *SM90_OPCODES, *SM90_PRODUCTS, E4M3_OPCODE)
                if opcode in line
            )
    return found


def allowed_stack(kernel: str) -> int:
    """Bytes. None but in prefill for 90a where the sums alone take half of all registers."""
    return 8 if "prefill_sm90_" in kernel and "_256_" in kernel else 0


def check(kernels: list[str], resources: dict, opcodes: dict) -> list[str]:
    """What is wrong, a line each."""
    errors = []
    archs = sorted({arch for _, arch in resources}, key=lambda arch: int(arch.rstrip("abf")))
    for kernel in kernels:
        for arch in filter(lambda arch: is_for(kernel, arch), archs):
            name = f"{kernel} sm_{arch}"
            if (kernel, arch) not in resources:
                errors.append(f"{name}: not compiled")
                continue
            if not kernel.startswith(("prefill", "decode", "mla_decode")):
                continue
            _, stack = resources[kernel, arch]
            allowed = allowed_stack(kernel)
            if stack > allowed:
                errors.append(f"{name}: {stack} bytes of stack, allowed {allowed}")
            missing = [
                opcode for opcode in opcodes_of(kernel, arch) if opcode not in opcodes[kernel, arch]
            ]
            if missing:
                errors.append(f"{name}: no {', '.join(missing)}")
    return errors


def table(resources: dict, images: dict[str, int]) -> str:
    """The text of registers.csv."""
    archs = sorted({arch for _, arch in resources}, key=lambda arch: int(arch.rstrip("abf")))
    lines = [f"# {compiler()}", "kernel," + ",".join(f"sm_{arch}" for arch in archs)]
    for kernel in sorted({kernel for kernel, _ in resources}):
        counts = (str(resources.get((kernel, arch), ("-",))[0]) for arch in archs)
        lines.append(f"{kernel},{','.join(counts)}")
    lines += [f"bytes of {name},{size}" for name, size in sorted(images.items())]
    return "\n".join(lines) + "\n"


def differences(new: str, old: str, is_whole: bool) -> list[str]:
    """Lines that differ, unless another compiler has made them. Of a build of some kernels those of
    the others are not missed."""
    if new.split("\n", 1)[0] != old.split("\n", 1)[0]:
        return []
    changed = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    names = {line.split(",")[0] for line in new.splitlines()}
    return [
        line
        for line in changed
        if line[:1] in "+-"
        and line[:3] not in ("+++", "---")
        and (is_whole or line[1:].split(",")[0] in names)
    ]


def main() -> int:
    """Returns the exit status."""
    paths = sorted(Path(sys.argv[1]).rglob("*.fatbin"))
    if not paths:
        print(f"no fatbinaries under {sys.argv[1]}")
        return 1
    resources: dict = {}
    opcodes: dict = {}
    for path in paths:
        resources |= read_resources(path)
        opcodes |= read_opcodes(path)
    kernels, built = (
        expected_kernels(path)
        for path in (ROOT / "cuda/kernels.def", paths[0].parent / "kernels_built.def")
    )
    errors = check(built, resources, opcodes)
    text = table(resources, {path.stem: path.stat().st_size for path in paths})
    if "--write" in sys.argv:
        TABLE.write_text(text)
    elif changed := differences(text, TABLE.read_text(), kernels == built):
        errors += [f"{TABLE.name} says otherwise: look at the change, then --write", *changed]
    print("\n".join(errors) or f"{len(resources)} kernels pass")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
