"""What is told of rounds that `vllm_modes` measured: a table, a picture. An engine may have gone after some rounds."""

from __future__ import annotations

import statistics
from pathlib import Path

from kvferry.testing.vllm_modes import BATCHES, TIMES, Round


def report(rounds: list[Round]) -> None:
    """Print medians by mode, and those of its ratios to the first. In the first round all modes are there."""
    first = next(iter(rounds[0]))
    names = TIMES if TIMES[0] in rounds[0][first] else BATCHES
    print(f"{f'{len(rounds)} rounds':10}" + "".join(f"{name + ', ms':>12} / {first:8}" for name in names))
    for mode in rounds[0]:
        rows = [of for of in rounds if mode in of]
        cells = []
        for name in names:
            ratios = [of[mode][name] / of[first][name] for of in rows if first in of]
            cells.append(
                f"{1e3 * statistics.median(of[mode][name] for of in rows):12.1f} {statistics.median(ratios):10.3f}"
            )
        notes = f"  hit {min(of[mode]['hit_tokens'] for of in rows):,}"
        if "is_same" in rows[0][mode]:
            notes += f", same tokens: {all(of[mode]['is_same'] for of in rows)}"
        if len(rows) < len(rounds):
            notes += f", in {len(rows)} rounds"
        print(f"{mode:10}" + "".join(cells) + notes, flush=True)


def plot(figures: dict[str, list[Round]], path: Path) -> None:
    """Times to first token by mode, one picture a length. Needs matplotlib."""
    from matplotlib.figure import Figure

    lengths = [length for length in figures if length != "batch" and figures[length]]
    picture = Figure(figsize=(4.5 * max(1, len(lengths)), 3.6), layout="constrained")
    for at_length, length in enumerate(lengths):
        axes = picture.add_subplot(1, len(lengths), at_length + 1)
        modes = [*figures[length][0]]
        for at, name in enumerate(TIMES):
            seconds = [[of[mode][name] for of in figures[length] if mode in of] for mode in modes]
            heights = [1e3 * statistics.median(of_mode) for of_mode in seconds]
            bars = axes.bar([place + 0.27 * at for place in range(len(modes))], heights, 0.25, label=name)
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        axes.set(title=f"{int(length):,} tokens", ylabel="time to first token, ms")
        is_same = {mode: all(of[mode]["is_same"] for of in figures[length] if mode in of) for mode in modes}
        labels = [mode if is_same[mode] else f"{mode}\n(other tokens)" for mode in modes]
        axes.set_xticks([place + 0.27 for place in range(len(modes))], labels)
    if lengths:
        picture.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(TIMES))
    picture.savefig(path, dpi=150)
