# SPDX-License-Identifier: Apache-2.0
"""steps.py goes on behind a step that hangs and one that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STEPS = Path(__file__).with_name("steps.py")
PROGRAM = """
import os, sys, time
from steps import Steps
steps = Steps()
for name, call in {
    "one": lambda: None,
    "two": lambda: time.sleep(60),
    "three": lambda: os._exit(3),
    "four": lambda: None,
}.items():
    if steps.begin(name):
        call()
        print(name, "came back", flush=True)
steps.done()
sys.exit(int(sys.argv[1]))
"""


def run(tmp_path: Path, *arguments: str, program: str = PROGRAM) -> subprocess.CompletedProcess:
    path = tmp_path / "program.py"
    path.write_text(program)
    return subprocess.run(
        [sys.executable, STEPS, *arguments[:-1], path, arguments[-1]],
        env={**os.environ, "PYTHONPATH": str(STEPS.parent)},
        capture_output=True,
        text=True,
    )


def test_it_goes_on_behind_what_does_not_come_back(tmp_path):
    result = run(tmp_path, "--silence", "3", "0")
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert [line for line in lines if "came back" in line] == ["one came back", "four came back"]
    assert lines[-2:] == [
        "did not come back: two: hung: silent for 3 s",
        "did not come back: three: exit status 3",
    ]


def test_no_step_begins_without_time(tmp_path):
    result = run(tmp_path, "--seconds", "0", "0")
    assert result.returncode == 0
    assert [line.split()[1:] for line in result.stdout.splitlines()] == [["no", "time", "left"]] * 4


def test_a_program_that_is_not_content_or_cannot_begin(tmp_path):
    result = run(tmp_path, "0", program="import sys; print('no such module'); sys.exit(2)")
    assert (result.returncode, "exit status 2" in result.stdout) == (1, True)
    result = run(tmp_path, "7", program="from steps import Steps; Steps().done(); exit(7)")
    assert (result.returncode, "exit status 7" in result.stdout) == (1, True)
