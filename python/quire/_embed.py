# SPDX-License-Identifier: Apache-2.0
"""Where C and C++ programs find quire inside the installed package."""

from __future__ import annotations

from pathlib import Path

from . import _core

_ROOT = Path(_core.__file__).parent  # where an editable install has them, too


def get_include() -> str:
    """Return the folder of the headers: `quire/quire.h` for C, the others for C++.

    Example::

        cc engine.c -I$(python -c "import quire; print(quire.get_include())")
    """
    return str(_ROOT / "include")


def get_cmake_dir() -> str:
    """Return the folder of the CMake package; `python -m quire --cmakedir` prints it.

    Example::

        cmake -S . -B build -Dquire_DIR=$(python -m quire --cmakedir)
        # find_package(quire) gives quire::quire (shared) and quire::quire_static
    """
    return str(_ROOT / "lib/cmake/quire")
