# SPDX-License-Identifier: Apache-2.0
"""Where C and C++ programs find quire inside the installed package."""

from __future__ import annotations

import os.path  # pathlib would be half of the time that importing quire takes

from . import _core

_ROOT = os.path.dirname(_core.__file__)  # where an editable install has them, too


def get_include() -> str:
    """Return the folder of the headers: `quire/quire.h` for C, the others for C++.

    Example::

        cc engine.c -I$(python -c "import quire; print(quire.get_include())")
    """
    return os.path.join(_ROOT, "include")


def get_cmake_dir() -> str:
    """Return the folder of the CMake package; `python -m quire --cmakedir` prints it.

    Example::

        cmake -S . -B build -Dquire_DIR=$(python -m quire --cmakedir)
        # find_package(quire) gives quire::quire (shared) and quire::quire_static
    """
    return os.path.join(_ROOT, "lib", "cmake", "quire")
