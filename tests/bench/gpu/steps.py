# SPDX-License-Identifier: Apache-2.0
"""A program of many steps of which some may hang, or take the CUDA context with them: each is named
before it begins, and where one does not come back another process goes on behind it.

    python tests/bench/gpu/steps.py [--silence 20] [--seconds 200] PROGRAM ARGUMENTS...

PROGRAM is a Python file that asks `Steps`. One that prints nothing for --silence seconds has hung;
three times as long is allowed before its first step. After --seconds no step begins. Exit status:
0 if every step came back and PROGRAM was content."""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import threading
import time

MARK = "@step "
FIRST, DEADLINE = "QUIRE_FIRST_STEP", "QUIRE_STEPS_DEADLINE"


class Steps:
    """What the program asks before each step, and tells at its end."""

    def __init__(self) -> None:
        self.count = 0
        self.first = int(os.environ.get(FIRST, "0"))
        self.deadline = float(os.environ.get(DEADLINE, "inf"))
        self.is_watched = FIRST in os.environ

    def begin(self, name: str) -> bool:
        """Whether to run the step: not if a process before this one has, nor without time."""
        index, self.count = self.count, self.count + 1
        if index < self.first:
            return False
        if time.time() > self.deadline:
            print(f"{name:34} no time left", flush=True)
            return False
        if self.is_watched:
            print(f"{MARK}{index} {name}", flush=True)
        return True

    def done(self) -> None:
        if self.is_watched:
            print(f"{MARK}done", flush=True)


def read_lines(process: subprocess.Popen, lines: queue.Queue) -> None:
    for line in process.stdout:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def run_once(command: list[str], first: int, silence: float) -> tuple[str, str]:
    """(the last step that began, "" or "done"; what became of the process: "" if all is well)."""
    environment = {**os.environ, FIRST: str(first)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=read_lines, args=(process, lines), daemon=True).start()
    last = ""
    while True:
        try:
            line = lines.get(timeout=silence if last else 3 * silence)
        except queue.Empty:
            process.kill()
            return last, f"hung: silent for {silence if last else 3 * silence:g} s"
        if line is None:
            status = process.wait()
            return last, f"exit status {status}" if status else ""
        if line.startswith(MARK):
            last = line[len(MARK) :]
        else:
            print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--silence", type=float, default=20)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("program", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    os.environ[DEADLINE] = str(time.time() + args.seconds)
    first, lost = 0, []
    while True:
        last, trouble = run_once([sys.executable, *args.program], first, args.silence)
        if last in ("", "done"):
            break
        index, name = last.split(" ", 1)
        lost.append(f"{name}: {trouble or 'ended early'}")
        print(f"LOST {lost[-1]}", flush=True)
        first = int(index) + 1
    if trouble:
        print(f"{args.program[0]}: {trouble}", flush=True)
    for line in lost:
        print(f"did not come back: {line}", flush=True)
    return int(bool(lost or trouble))


if __name__ == "__main__":
    sys.exit(main())
