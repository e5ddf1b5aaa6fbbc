# SPDX-License-Identifier: Apache-2.0
"""Gates on the compiled kernels: what ptxas made of each line of kernels.def, for every
architecture.

    python tests/emulator/gates.py BUILD/cuda [--write]

Reads the objects with cuobjdump (packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm; both
programs on PATH). Checks that every kernel is there, that the main kernels keep nothing in local
memory, and that tensor cores and asynchronous copies are used. The registers of every kernel are
compared with cuda/registers.csv; --write writes that file instead."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "cuda" / "registers.csv"
OPCODES = ("HMMA.16816", "LDGSTS", "LDSM.16.M88", "LDSM.16.MT88")


def expected_kernels() -> list[str]:
    """The entry points that kernels.def names: see cuda/entry.cuh."""
    lines = re.findall(
        r"^QUIRE_(\w+)\((.*)\)", (ROOT / "cuda/kernels.def").read_text(), re.MULTILINE
    )
    return [f"{name.lower()}_{arguments.replace(', ', '_')}" for name, arguments in lines]


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
    """(kernel, architecture) -> those of OPCODES that its code contains."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    arch, kernel = "", ""
    for line in cuobjdump("-sass", str(path)):
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            kernel = match[1]
        else:
            found[kernel, arch].update(opcode for opcode in OPCODES if opcode in line)
    return found


def allowed_stack(kernel: str) -> int:
    """Bytes. A few spilled registers where every option is in or where the sums alone take half
    of all registers; none elsewhere."""
    return 32 if kernel.endswith("kFull") or kernel.split("_")[2] == "256" else 0


def check(resources: dict, opcodes: dict) -> list[str]:
    """What is wrong, a line each."""
    errors = []
    archs = sorted({arch for _, arch in resources}, key=lambda arch: int(arch.rstrip("abf")))
    for kernel in expected_kernels():
        for arch in archs:
            name = f"{kernel} sm_{arch}"
            if (kernel, arch) not in resources:
                errors.append(f"{name}: not compiled")
                continue
            if not kernel.startswith(("prefill", "decode")):
                continue
            _, stack = resources[kernel, arch]
            allowed = allowed_stack(kernel)
            if stack > allowed:
                errors.append(f"{name}: {stack} bytes of stack, allowed {allowed}")
            missing = [opcode for opcode in OPCODES if opcode not in opcodes[kernel, arch]]
            if missing:
                errors.append(f"{name}: no {', '.join(missing)}")
    return errors


def table(resources: dict) -> str:
    archs = sorted({arch for _, arch in resources}, key=lambda arch: int(arch.rstrip("abf")))
    lines = ["kernel," + ",".join(f"sm_{arch}" for arch in archs)]
    for kernel in sorted({kernel for kernel, _ in resources}):
        counts = (str(resources.get((kernel, arch), ("-",))[0]) for arch in archs)
        lines.append(f"{kernel},{','.join(counts)}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns the exit status."""
    objects = sorted(Path(sys.argv[1]).rglob("*.cu.o"))
    if not objects:
        print(f"no objects under {sys.argv[1]}")
        return 1
    resources: dict = {}
    opcodes: dict = {}
    for path in objects:
        resources |= read_resources(path)
        opcodes |= read_opcodes(path)
    errors = check(resources, opcodes)
    if "--write" in sys.argv:
        TABLE.write_text(table(resources))
    elif not TABLE.exists() or TABLE.read_text() != table(resources):
        errors.append(f"registers differ from {TABLE.name}: look at the change, then --write")
    print("\n".join(errors) or f"{len(resources)} kernels pass")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
