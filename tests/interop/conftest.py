# SPDX-License-Identifier: Apache-2.0
"""The bindings' tensor conversion as a module of its own."""

import pytest
from tensor_probe.build import load_probe


@pytest.fixture(scope="session")
def probe():
    return load_probe()
