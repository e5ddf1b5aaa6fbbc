# SPDX-License-Identifier: Apache-2.0
"""Live figures of a replay on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from .engine import Replay

_PLAIN_SECONDS = 5.0  # between plain lines


def status_line(replay: Replay) -> str:
    """What was done so far, in one line."""
    return (
        f"{replay.policy.name}: {replay.done:,} of {len(replay.trace):,} requests, {_live(replay)}"
    )


def _live(replay: Replay) -> str:
    rate = replay.tokens / max(replay.seconds, 1e-9)
    return (
        f"{replay.running:,} running, {replay.waiting:,} waiting,"
        f" memory {replay.used_share:.0%}, {rate:,.0f} tokens/s"
    )


class LiveProgress:
    """Implements session.Progress; a context manager that leaves the terminal clean."""

    def __init__(self, console: Console) -> None:
        """Nothing is shown before start()."""
        self.last: Replay | None = None
        self._console = console
        self._bar = RichProgress(
            TextColumn("{task.description:>20}"),
            BarColumn(12),
            TextColumn(
                "{task.completed:,.0f}/{task.total:,.0f}, {task.fields[live]}",
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = TaskID(0)
        self._next_line = 0.0

    def __enter__(self) -> LiveProgress:
        """Take the terminal."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the terminal back."""
        self._bar.stop()

    def start(self, replay: Replay) -> None:
        """A policy begins."""
        self._task = self._bar.add_task(replay.policy.name, total=len(replay.trace), live="")
        self._next_line = time.perf_counter() + _PLAIN_SECONDS
        self.update(replay)

    def update(self, replay: Replay) -> None:
        """It goes on."""
        self.last = replay
        if self._console.is_terminal:
            self._bar.update(self._task, completed=replay.done, live=_live(replay), refresh=True)
        elif time.perf_counter() >= self._next_line:
            self._next_line += _PLAIN_SECONDS
            self._print(status_line(replay))

    def finish(self, replay: Replay) -> None:
        """It is done."""
        self.update(replay)
        if not self._console.is_terminal:
            self._print(
                f"{replay.policy.name}: {replay.done:,} requests in {replay.steps:,} steps,"
                f" {replay.seconds:.1f} s"
            )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
