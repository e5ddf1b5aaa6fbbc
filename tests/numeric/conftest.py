# SPDX-License-Identifier: Apache-2.0
"""The suite's modules import each other by name, so that any backend can be put under them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
