# SPDX-License-Identifier: Apache-2.0
"""Timing of candidates that take turns. On a GPU a candidate's calls are replayed as a CUDA graph
where it can be captured, so that what is timed is the device and not the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


class Clock:
    """Times a function in seconds, over `count` calls."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def prepare(
        self, call: Callable[[int], object], count: int, graph: bool
    ) -> tuple[Callable[[], object], bool]:
        """One function for `count` calls, call(0), call(1), ..., and whether it is a graph."""

        def all_calls() -> None:
            for i in range(count):
                call(i)

        if self.stream is None:
            all_calls()
            return all_calls, False
        # Warm up on the stream that is captured: what is sent once a stream is not captured then.
        with torch.cuda.stream(self.stream):
            all_calls()
        self.stream.synchronize()
        if not graph:
            return all_calls, False
        try:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=self.stream):
                all_calls()
            return captured.replay, True
        except RuntimeError:
            torch.cuda.synchronize()
            return all_calls, False

    def time(self, function: Callable[[], object]) -> float:
        """Seconds that one call of `function` keeps the device busy."""
        if self.stream is None:
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin
        events = [torch.cuda.Event(enable_timing=True) for _ in "be"]
        with torch.cuda.stream(self.stream):
            events[0].record()
            function()
            events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) * 1e-3


def interleave(
    clock: Clock,
    calls: dict[str, Callable[[int], object]],
    count: int,
    rounds: int,
    graph: bool = True,
) -> dict[str, float]:
    """Median seconds a call of each candidate: they take turns, forwards and backwards."""
    functions = {name: clock.prepare(call, count, graph)[0] for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for round_ in range(rounds):
        for name in order if round_ % 2 == 0 else reversed(order):
            times[name].append(clock.time(functions[name]) / count)
    return {name: statistics.median(values) for name, values in times.items()}
