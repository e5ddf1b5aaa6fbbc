# SPDX-License-Identifier: Apache-2.0
"""mutations.py is too slow for every run; that its list fits the kernels is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from mutations import MUTATIONS, ROOT, planted, program_of  # noqa: E402


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_a_planted_bug_has_its_place(mutation):
    source = (ROOT / mutation.file).read_text()
    assert planted(source, mutation) != source
    assert (FOLDER / f"{program_of(mutation)}.cpp").exists()


def test_no_bug_is_planted_twice():
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS)
