# SPDX-License-Identifier: Apache-2.0
"""`python -m quire` is the command `quire`."""

from .cli import main

main()
