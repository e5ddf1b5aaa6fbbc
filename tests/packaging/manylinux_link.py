# SPDX-License-Identifier: Apache-2.0
"""Links shared libraries that run on older systems than the one that builds them.

    python manylinux_link.py GLIBC_VERSION [g++'s arguments for -shared]

g++ compiles; this links, with Zig's linker (package ziglang), against the symbol versions of the
given glibc, with libstdc++ inside and hidden. Exceptions still pass from one library to the other:
the unwinder, libgcc_s.so.1, stays shared, and types are compared by name.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from pathlib import Path

# What the build machine's libstdc++.a wants of a glibc newer than the target's.
COMPAT = """
#include <errno.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
char __libc_single_threaded = 0;  /* false is always right: atomics instead of plain counts */
uint32_t arc4random(void) {
  uint32_t value = 0;
  while (syscall(SYS_getrandom, &value, sizeof value, 0) != sizeof value && errno == EINTR) {}
  return value;
}
"""
# The library shows what is quire's, a Python module and the CUDA plugin their one function (by a
# pattern: the linker refuses a name that is not there).
LIBRARY = "{ global: quire_*; _Z*5quire*; local: *; };"
MODULE = "{ global: PyInit_*; quire_cuda_*; local: *; };"


def of_compiler(name: str) -> str:
    """The path of one of g++'s own files."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def link(glibc: str, arguments: list[str]) -> int:
    """Link a shared library; the exit status."""
    zig = [sys.executable, "-m", "ziglang", "cc", "-target"]
    zig.append(f"{platform.machine()}-linux-gnu.{glibc}")
    is_library = any(argument.startswith("-Wl,-soname") for argument in arguments)
    kept = [argument for argument in arguments if keep(argument)]
    with tempfile.TemporaryDirectory() as folder:
        compat, script = Path(folder) / "compat.c", Path(folder) / "symbols.map"
        compat.write_text(COMPAT)
        script.write_text(LIBRARY if is_library else MODULE)
        # libgcc.a, too: __builtin_cpu_supports reads a variable that g++'s own start code fills.
        own = [of_compiler(name) for name in ("libstdc++.a", "libgcc.a", "libgcc_s.so.1")]
        options = ["-O2", "-s", "-fvisibility=hidden", f"-Wl,--version-script={script}"]
        libraries = [str(compat), *own, "-lm", "-lpthread"]
        return subprocess.run([*zig, *options, *kept, *libraries]).returncode


def keep(argument: str) -> bool:
    """Whether an argument of g++ is one that linking needs and Zig's linker has."""
    if argument.startswith("-Wl,"):
        return argument.startswith(("-Wl,-soname", "-Wl,-rpath", "-Wl,--gc-sections"))
    if argument.startswith("-"):
        return argument == "-shared" or argument.startswith(("-o", "-L", "-l"))
    return True


if __name__ == "__main__":
    sys.exit(link(sys.argv[1], sys.argv[2:]))
