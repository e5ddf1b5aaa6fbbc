# SPDX-License-Identifier: Apache-2.0
"""The entry point of the command `quire`, which needs the packages of the extra `quire[cli]`.

`--cmakedir` needs none of them: it is for builds of C and C++ programs.
"""

from __future__ import annotations

import sys

from ._embed import get_cmake_dir


def main() -> None:
    """Run the command."""
    if sys.argv[1:] == ["--cmakedir"]:
        print(get_cmake_dir())
        return
    try:
        from .commands import app

        app(prog_name="quire")
    except ModuleNotFoundError as error:
        raise SystemExit(
            f'quire: there is no module {error.name}: pip install "quire[cli]"'
        ) from None
