"""What KV connectors do to a real vLLM: time to first token cold, from vLLM's pool and from outside it, and batches.

    python benchmarks/vllm_ttft.py none kvferry server [--model FOLDER] [--lengths 2048,8192,32768] [--rounds 5]

Modes: none, native (vLLM's OffloadingConnector) and lmcache (both on CUDA), example (vLLM's ExampleConnector), kvferry,
server (kvferry with a cache server, which is started). Each has an engine in a process of its own. All are there at
once and take turns with the same prompts, in random order, so that the moods of the machine meet all alike. What is hit
from outside was removed from vLLM's pool before. Without a model: random weights in the shape of Llama 3 8B, for a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from kvferry.testing.vllm_modes import MODES, EngineGoneError, EngineShape, Mode, Prompt

TIMES = ("cold", "pool", "outside")
BATCHES = ("new", "again")


def take_turns(modes: list[Mode], prompts: list[Prompt], num_tokens: int, settle: float) -> dict[str, Any]:
    """What each mode makes of the same prompts. settle: seconds that saves have afterwards."""
    answers = {mode.name: mode.run(prompts, num_tokens) for mode in random.sample(modes, len(modes))}
    time.sleep(settle)
    return answers


def draw(given: argparse.Namespace, num_tokens: int) -> Prompt:
    return {"prompt_token_ids": [random.randrange(10, given.vocabulary) for _ in range(num_tokens)]}


def measure_prompt(modes: list[Mode], given: argparse.Namespace, num_tokens: int) -> dict[str, Any]:
    """By mode: seconds of one new prompt cold, from the pool, from outside; tokens hit outside; all answers equal."""
    prompts = [draw(given, num_tokens)]
    answers = {name: take_turns(modes, prompts, 1, given.settle) for name in TIMES[:2]}
    for mode in modes:
        mode.evict()
    answers["outside"] = take_turns(modes, prompts, 1, given.settle)
    rows: dict[str, Any] = {}
    for mode in modes:
        of = {name: answers[name][mode.name] for name in TIMES}
        tokens = [answer[0][0] for _, answer in of.values()]
        rows[mode.name] = {name: seconds for name, (seconds, _) in of.items()}
        rows[mode.name] |= {"hit_tokens": of["outside"][1][0][1], "is_same": all(it == tokens[0] for it in tokens)}
    return rows


def measure_batch(modes: list[Mode], given: argparse.Namespace) -> dict[str, Any]:
    """By mode: seconds of a batch of new prompts, and of the same after all was evicted."""
    prompts = [draw(given, given.batch_tokens) for _ in range(given.batch)]
    new = take_turns(modes, prompts, given.batch_new, given.settle)
    for mode in modes:
        mode.evict()
    again = take_turns(modes, prompts, given.batch_new, given.settle)
    return {mode.name: {"new": new[mode.name][0], "again": again[mode.name][0]} for mode in modes}


def report(rounds: list[dict[str, Any]], modes: list[Mode], names: tuple[str, ...]) -> None:
    first = modes[0].name
    print(f"{'':10}" + "".join(f"{name + ', ms':>12} / {first:5}" for name in names))
    for mode in modes:
        cells = []
        for name in names:
            ratio = statistics.median(of[mode.name][name] / of[first][name] for of in rounds)
            cells.append(f"{1e3 * statistics.median(of[mode.name][name] for of in rounds):12.1f} {ratio:7.3f}")
        row = [of[mode.name] for of in rounds]
        notes = f"  hit {min(of['hit_tokens'] for of in row)}, same tokens: {all(of['is_same'] for of in row)}"
        print(f"{mode.name:10}" + "".join(cells) + (notes if "hit_tokens" in row[0] else ""), flush=True)


def run_rounds(modes: list[Mode], given: argparse.Namespace, num_tokens: int) -> list[dict[str, Any]]:
    """Rounds of one prompt of so many tokens; 0: of the batch. An engine that is gone is left out from then on."""
    rounds: list[dict[str, Any]] = []
    while modes and len(rounds) < given.rounds:
        try:
            rounds.append(measure_prompt(modes, given, num_tokens) if num_tokens else measure_batch(modes, given))
        except EngineGoneError as error:
            print(f"left out: {error}", flush=True)
            modes.remove(error.mode)
            error.mode.close()
    if rounds and modes:
        report(rounds, modes, TIMES if num_tokens else BATCHES)
    return rounds


def plot(figures: dict[str, Any], path: Path) -> None:
    """Times to first token by mode, one picture a length. Needs matplotlib."""
    from matplotlib.figure import Figure

    lengths = [length for length in figures if length != "batch" and figures[length]]
    picture = Figure(figsize=(4.5 * len(lengths), 3.6), layout="constrained")
    for axes, length in zip(picture.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        modes = [*figures[length][-1]]
        for at, name in enumerate(TIMES):
            seconds = [[of[mode][name] for of in figures[length] if mode in of] for mode in modes]
            heights = [1e3 * statistics.median(of_mode) for of_mode in seconds]
            bars = axes.bar([place + 0.27 * at for place in range(len(modes))], heights, 0.25, label=name)
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        axes.set(title=f"{int(length):,} tokens", ylabel="time to first token, ms")
        axes.set_xticks([place + 0.27 for place in range(len(modes))], modes)
    picture.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(TIMES))
    picture.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", default=["none", "kvferry"], metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--model", help="a folder")
    parser.add_argument("--lengths", default=[2048, 8192, 32768], type=lambda text: [int(of) for of in text.split(",")])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-tokens", type=int, default=16, help="of vLLM's blocks: 128 on a CPU")
    parser.add_argument("--vocabulary", type=int, default=40000)
    parser.add_argument("--batch", type=int, default=0, help="requests of a batch; 0: none")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of each prompt of the batch")
    parser.add_argument("--batch-new", type=int, default=256, help="tokens that each of them generates")
    parser.add_argument("--outside-gb", type=float, default=20.0, help="memory of each connector")
    parser.add_argument("--settle", type=float, default=1.0, help="seconds that saves have after each turn")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a mode is given up")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--plot", type=Path, help="also draw the times to first token here")
    given = parser.parse_args()
    if unknown := set(given.modes) - set(MODES):
        parser.error(f"no mode: {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    if importlib.util.find_spec("vllm") is None:
        print("needs vLLM beside kvferry: see docs/vllm.md")
        return
    longest = max(given.lengths) + 8 * given.block_tokens
    pool_tokens = max(longest, given.batch * (given.batch_tokens + given.batch_new))
    share = round(0.9 / len(given.modes), 3)
    shape = EngineShape(given.model, longest, pool_tokens, given.block_tokens, share, given.outside_gb)
    modes: list[Mode] = []
    try:
        for name in given.modes:
            try:
                modes.append(Mode(name, shape, given.timeout))
                print(f"{name}: ready after {modes[-1].start_seconds:.1f} s", flush=True)
            except EngineGoneError as error:
                print(f"left out: {error}", flush=True)
        take_turns(modes, [draw(given, min(given.lengths))], 4, given.settle)
        figures: dict[str, Any] = {}
        for num_tokens in given.lengths:
            print(f"one prompt of {num_tokens:,} tokens, median of {given.rounds}")
            figures[str(num_tokens)] = run_rounds(modes, given, num_tokens)
        if given.batch:
            print(f"{given.batch} prompts of {given.batch_tokens:,} tokens and {given.batch_new} new ones each")
            figures["batch"] = run_rounds(modes, given, 0)
    finally:
        for mode in modes:
            mode.close()
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if given.plot is not None:
        plot(figures, given.plot)


if __name__ == "__main__":
    main()
