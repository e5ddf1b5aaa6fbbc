# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about a comparison: figures as inline SVG, and the table."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter, StrMethodFormatter

import quire

from .outcome import Outcome
from .samples import Samples
from .session import Comparison
from .table import notes, table_rows
from .trace import InputError

Float64Array = npt.NDArray[np.float64]

_MAX_POINTS = 300  # of a curve
_POLICY_COLORS = ("#c2410c", "#0369a1", "#15803d")
# From the bottom up: what the memory holds.
_LAYERS = (
    ("tokens", "#0369a1"),
    ("handed out, empty", "#f59e0b"),
    ("cached, held by nobody", "#86d0a0"),
    ("free", "#eef0f3"),
)
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1ab",
    "axes.grid": True,
    "grid.color": "#e7e9ed",
    "axes.axisbelow": True,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "svg.fonttype": "none",
    "svg.hashsalt": "quire",  # the same replay gives the same ids
}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1040px;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: .3rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
code {{ background: #f3f4f6; padding: .15rem .4rem; border-radius: 4px; }}
p {{ margin: .2rem 0; }} .note {{ color: #4b5563; font-size: 13px; }}
table {{ border-collapse: collapse; width: 100%; margin: 1rem 0; }}
th, td {{ padding: .35rem .6rem; border-bottom: 1px solid #e5e7eb; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }} thead th {{ border-color: #6b7280; }}
td {{ font-variant-numeric: tabular-nums; }} svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
<p><code>{command}</code></p>
{head}
<h2>The policies compared</h2>
{table}
{notes}
<h2>What the KV memory holds, step by step</h2>
{occupancy}
<h2>Requests and the prefix cache, step by step</h2>
{curves}
<p class="note">quire {version}</p>
</body></html>
"""


def write_report(path: Path, comparison: Comparison, head: list[str], command: str) -> None:
    """Writes the page; `head`: the lines that say what was replayed."""
    rows = table_rows(comparison)
    title = f"KV cache replay: {comparison.trace.name}"
    with matplotlib.rc_context(_STYLE):
        page = _PAGE.format(
            title=escape(title),
            command=escape(command),
            head=_paragraphs(head),
            table=_table(["", *(outcome.policy for outcome in comparison.outcomes)], rows),
            notes=_paragraphs(notes(comparison), "note"),
            occupancy=_svg(_draw_occupancy(comparison)),
            curves=_svg(_draw_curves(comparison)),
            version=quire.__version__,
        )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--report: {path}: {error.strerror or error}") from error


def _paragraphs(lines: list[str], css_class: str = "") -> str:
    return "\n".join(f'<p class="{css_class}">{escape(line)}</p>' for line in lines)


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _curve(samples: Samples, name: str) -> Float64Array:
    """One field, averaged to at most _MAX_POINTS points."""
    values = samples.column(name)
    edges = np.linspace(0, len(values), min(len(values), _MAX_POINTS) + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(values)))
    means: Float64Array = np.add.reduceat(values, edges) / counts
    return means


def _draw_occupancy(comparison: Comparison) -> Figure:
    figure = Figure(figsize=(10.4, 2.9), layout="constrained")
    panels: Any = figure.subplots(1, len(comparison.outcomes), sharey=True)
    colors = [color for _, color in _LAYERS]
    for axes, outcome, samples in zip(panels, comparison.outcomes, comparison.samples, strict=True):
        layers = _occupancy(outcome, samples)
        axes.stackplot(_curve(samples, "step"), layers, colors=colors, linewidth=0)
        axes.set_title(outcome.policy)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _label_steps(axes)
    panels[0].set_ylabel("share of all slots")
    figure.legend(
        handles=[matplotlib.patches.Patch(color=color, label=name) for name, color in _LAYERS],
        loc="outside lower center",
        ncols=len(_LAYERS),
        frameon=False,
    )
    return figure


def _occupancy(outcome: Outcome, samples: Samples) -> list[Float64Array]:
    """Shares of all slots, in the order of _LAYERS."""
    tokens = _curve(samples, "used_tokens") / (outcome.num_blocks * outcome.block_size)
    used = _curve(samples, "used_blocks") / outcome.num_blocks
    cached = _curve(samples, "cached_blocks") / outcome.num_blocks
    return [tokens, used - tokens, cached, 1 - used - cached]


def _draw_curves(comparison: Comparison) -> Figure:
    figure = Figure(figsize=(10.4, 5.2), layout="constrained")
    panels: Any = figure.subplots(2, 2)
    curves = (
        ("memory that holds tokens, share of all slots", "used_tokens"),
        ("running sequences", "running"),
        ("waiting requests", "waiting"),
        ("prompt tokens found cached so far", "hit_rate"),
    )
    for axes, (title, name) in zip(panels.flat, curves, strict=True):
        for outcome, samples, color in zip(
            comparison.outcomes, comparison.samples, _POLICY_COLORS, strict=True
        ):
            if name == "hit_rate" and outcome.token_hit_rate is None:
                continue  # a policy without prefix cache
            values = _curve(samples, name)
            if name == "used_tokens":
                values = values / (outcome.num_blocks * outcome.block_size)
            axes.plot(_curve(samples, "step"), values, color=color, label=outcome.policy)
        axes.set_title(title)
        if name == "running":  # a few against hundreds
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.9)
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        else:
            axes.set_ylim(bottom=0)
        if name in ("used_tokens", "hit_rate"):
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        _label_steps(axes)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(comparison.outcomes),
        frameon=False,
    )
    return figure


def _label_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.margins(x=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
