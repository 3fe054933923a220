"""The demo's table (rich) and bar chart (matplotlib). Knows the steps' results, but no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from kvferry.cli.demo.steps import Answer

_SOURCES = (
    ("pool", "num_pool_tokens", "#2a9d8f"),
    ("memory", "num_memory_tokens", "#457b9d"),
    ("disk", "num_disk_tokens", "#8d6cab"),
    ("computed", "num_computed_tokens", "#e76f51"),
)
_INK = "#22303c"


@dataclass(frozen=True, slots=True)
class Step:
    """One question: what it shows, its answer, and whether the engine without any reuse gave the same tokens."""

    name: str
    question: str
    answer: Answer
    is_same: bool


def make_table(steps: Sequence[Step]) -> Table:
    """Every step's tokens by source, TTFT and verdict."""
    from rich import box
    from rich.table import Table

    table = Table(
        title="One document, asked about again and again",
        caption="same tokens: compared one by one with an engine that computes everything",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("step", no_wrap=True)
    for heading in (
        "prompt\ntokens",
        "from\npool",
        "from\nmemory",
        "from\ndisk",
        "re-\ncomputed",
        "TTFT",
        "times\nfaster",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("same\ntokens", no_wrap=True)
    for step in steps:
        answer = step.answer
        table.add_row(
            step.name,
            f"{answer.num_prompt_tokens:,}",
            *(_count(getattr(answer, attribute)) for _, attribute, _ in _SOURCES),
            f"{answer.ttft_seconds:.3f} s",
            f"{_speedup(steps, step):.1f}x",
            "[green]yes[/]" if step.is_same else "[bold red]NO[/]",
        )
    return table


def save_chart(steps: Sequence[Step], path: Path) -> None:
    """Two panels of bars, one bar a step: time to first token, and where the prompt's KV came from."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    times, sources = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
    figure.suptitle(
        "kvferry: the same document, asked about again", x=0.01, ha="left", fontsize=14, weight="bold", color=_INK
    )
    _draw_times(times, steps)
    _draw_sources(sources, steps)
    for axes in (times, sources):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False, colors=_INK)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(path, facecolor="white")


def _draw_times(axes: Axes, steps: Sequence[Step]) -> None:
    colors = {attribute: color for _, attribute, color in _SOURCES}
    rows = range(len(steps))
    seconds = [step.answer.ttft_seconds for step in steps]
    # A bar has the colour of the source that most of the prompt came from.
    axes.barh(rows, seconds, color=[colors[_main_source(step.answer)] for step in steps], height=0.62)
    for row, step in enumerate(steps):
        label = f" {step.answer.ttft_seconds:.2f} s"
        if row:
            label += f"   {_speedup(steps, step):.1f}x faster"
        axes.text(step.answer.ttft_seconds, row, label, va="center", color=_INK)
    axes.set_yticks(rows, [step.name for step in steps])
    axes.invert_yaxis()
    axes.set_xlim(0, max(seconds) * 1.18)
    axes.set_title("Time to first token, seconds", loc="left", fontsize=11, color=_INK)


def _draw_sources(axes: Axes, steps: Sequence[Step]) -> None:
    rows = range(len(steps))
    left = [0] * len(steps)
    for label, attribute, color in _SOURCES:
        counts = [getattr(step.answer, attribute) for step in steps]
        axes.barh(rows, counts, left=left, color=color, height=0.62, label=label)
        left = [start + count for start, count in zip(left, counts, strict=True)]
    axes.set_xlim(0, max(left))
    axes.set_title("Where the prompt's KV came from, tokens", loc="left", fontsize=11, color=_INK)
    axes.legend(ncols=len(_SOURCES), loc="upper left", bbox_to_anchor=(0, -0.1), frameon=False, labelcolor=_INK)


def _main_source(answer: Answer) -> str:
    return max((attribute for _, attribute, _ in _SOURCES), key=lambda attribute: int(getattr(answer, attribute)))


def _count(num_tokens: int) -> str:
    return f"{num_tokens:,}" if num_tokens else "[dim]0[/]"


def _speedup(steps: Sequence[Step], step: Step) -> float:
    """How many times sooner than in the first step, which is cold."""
    return steps[0].answer.ttft_seconds / step.answer.ttft_seconds
