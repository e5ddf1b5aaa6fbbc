# SPDX-License-Identifier: Apache-2.0
"""The commands: `replay` runs a request trace, `bench` measures, `info` shows this machine.

Exit codes: 0 done, 1 a check failed, 2 what was given can't be used, 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import quire
from quire.bench import table as bench_table
from quire.replay import session, table
from quire.replay.policies import Geometry, make_policies
from quire.replay.progress import LiveProgress, status_line
from quire.replay.synthetic import synthetic_trace
from quire.replay.trace import InputError, Trace, read_trace

_SYNTHETIC_REQUESTS = 1000
_VERIFY_ROWS = 32

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Attention over paged KV caches.",
    epilog="quire --cmakedir prints the folder of the CMake package, for C and C++ programs.",
)


class AttentionMode(str, Enum):
    """What computes the attention of a replay."""

    cpu = "cpu"
    none = "none"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"quire {quire.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def info() -> None:
    """Show what is installed and what this machine can do."""
    console = Console()
    lines = {
        "quire": quire.__version__,
        "CPU": f"{quire.cpu_isa()}, {quire.num_threads()} threads",
        "ISAs here": ", ".join(quire.supported_cpu_isas()),
        "CUDA": quire.cuda_state(),
    }
    for name, value in lines.items():
        console.print(f"{name:<10} {value}", highlight=False)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in quire.capabilities():
        groups.setdefault(row["features"], []).append(row)
    for features, rows in groups.items():
        console.print(f"\n{features}", highlight=False)
        names = [name for name in rows[0] if name != "features"]
        grid = Table(*names, box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            grid.add_row(*(_cell(row[name]) for name in names))
        console.print(grid)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):  # a range
        return "–".join(map(str, value))
    return str(value)


def _positive(default_help: str) -> Any:
    return typer.Option(min=1, help=default_help)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and samples.")] = False,
    threads: Annotated[
        int | None, _positive("CPU threads of all candidates. Default: what quire uses.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON lines alone.")] = False,
) -> None:
    """Measure attention on this machine against its limits and the peers that are installed.

    Every result is checked once, then all take turns; figures are medians. Compare ratios and
    shares of one line, not figures of different lines: a shared machine drifts.
    """
    from quire.bench import cases, measure, peers, roofs

    if threads:
        quire.set_num_threads(threads)
    count = quire.num_threads()
    found, roof = peers.installed(count), roofs.Roofs()
    names = [peer.name for peer in found]
    if not json_output:
        versions = "".join(f", {peer.name} {peer.version}" for peer in found)
        print(f"quire {quire.__version__} ({quire.cpu_isa()}, {count} threads){versions}")
        print(bench_table.head(names))
    for make in cases.standard(quick):
        row = measure.measure(make(), found, roof.measure, count, samples=3 if quick else 7)
        text = bench_table.to_json(row) if json_output else bench_table.line(row, names)
        print(text, flush=True)


@app.command()
def replay(
    trace: Annotated[Path | None, typer.Argument(help="CSV or JSONL, plain or .gz.")] = None,
    attention: Annotated[
        AttentionMode, typer.Option(help="Compute attention, or replay bookkeeping alone.")
    ] = AttentionMode.cpu,
    limit: Annotated[
        int | None,
        _positive("Requests to replay. Default: some 6 s of attention a policy, else all."),
    ] = None,
    num_heads: Annotated[int, _positive("Query heads of the layer.")] = 32,
    num_kv_heads: Annotated[int, _positive("KV heads of the layer.")] = 8,
    head_dim: Annotated[int, _positive("Head dimension of the layer.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    block_size: Annotated[int, _positive("Tokens a block of the paged policies.")] = 16,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            help="KV memory of the layer: 512MiB, 2GB, unlimited (without attention)."
            " Default: a quarter of what all requests need, at most 512MiB."
        ),
    ] = None,
    hash_block_size: Annotated[
        int | None, _positive("Tokens a hash id stands for. Default: inferred.")
    ] = None,
    verify: Annotated[
        int | None, typer.Option(min=0, help="Output rows to check. Default: 32.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random data.")] = 0,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page here.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Replay a trace of requests under three policies of KV memory, and compare them.

    Without TRACE, a synthetic one.
    """
    computes = attention is AttentionMode.cpu
    live = LiveProgress(Console(stderr=True))
    with _exit_codes(live):
        if verify and not computes:
            raise InputError("--verify: expected --attention cpu, got --attention none")
        if report is not None:
            _check_report(report)
        geometry = Geometry(num_heads, num_kv_heads, head_dim, dtype)
        whole = _load(trace, limit, hash_block_size, seed)
        if limit is None and computes:
            limit = session.affordable_requests(whole, geometry)
        part = whole.head(limit or len(whole))
        settings = session.Settings(
            geometry=geometry,
            block_size=block_size,
            kv_bytes=session.resolve_kv_bytes(kv_memory, part, geometry, computes),
            attention=computes,
            verify_rows=_VERIFY_ROWS if verify is None else verify,
            seed=seed,
        )
        _compare(part, len(whole), settings, live, _Outputs(report, json_output))


@contextmanager
def _exit_codes(live: LiveProgress) -> Iterator[None]:
    """Ends the command with one line on stderr where it can't go on."""
    try:
        yield
    except (InputError, MemoryError) as error:
        print(f"quire replay: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        done = status_line(live.last) if live.last else "nothing replayed yet"
        print(f"quire replay: interrupted; {done}", file=sys.stderr)
        raise typer.Exit(130) from error


class _Outputs(NamedTuple):
    report: Path | None
    json: bool


def _check_report(path: Path) -> None:
    from quire.replay import report  # noqa: F401  loads matplotlib now, not after the replay

    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"--report: expected a file in an existing folder, got {path}")


def _load(path: Path | None, limit: int | None, hash_block_size: int | None, seed: int) -> Trace:
    if path is None:
        return synthetic_trace(limit or _SYNTHETIC_REQUESTS, seed)
    return read_trace(path, hash_block_size)


def _compare(
    trace: Trace, total: int, settings: session.Settings, live: LiveProgress, outputs: _Outputs
) -> None:
    console = Console(soft_wrap=True, highlight=False)
    command = shlex.join(["quire", *sys.argv[1:]])
    policies = make_policies(
        trace,
        settings.geometry,
        settings.block_size,
        settings.kv_bytes,
        session.LIMITS.max_seqs,
    )
    head = table.headline(trace, total, settings)
    if not outputs.json:
        for line in head:
            console.print(escape(line))
    with live:
        comparison = session.compare(trace, policies, settings, live)
    if outputs.json:
        print(json.dumps(table.to_json(comparison, total, command), indent=2, allow_nan=False))
    else:
        _print_table(console, comparison)
    if outputs.report is not None:
        from quire.replay.report import write_report

        write_report(outputs.report, comparison, head, command)
    leaked = any(outcome.leaked_blocks for outcome in comparison.outcomes)
    if leaked or (comparison.verdict and not comparison.verdict.passed):
        raise typer.Exit(1)


def _print_table(console: Console, comparison: session.Comparison) -> None:
    grid = Table(Column(no_wrap=True))
    for outcome in comparison.outcomes:
        grid.add_column(outcome.policy, justify="right")
    for row in table.table_rows(comparison):
        grid.add_row(*(escape(cell) for cell in row))
    console.print(grid, soft_wrap=False)
    for line in table.notes(comparison):
        console.print(escape(line))
