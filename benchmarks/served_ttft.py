"""Time to first token of a hit in memory: in a cache server's against that of a store inside the engine.

In one run, interleaved; engines without a pool's reuse, so that every prompt after the first is loaded.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import tempfile
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from kvferry.cli.demo import DEFAULT_MODEL
from kvferry.cli.demo.document import document
from kvferry.cli.demo.steps import Setting, ask, open_engine
from kvferry.testing.servers import ServerProcess


def measure(setting: Setting, num_rounds: int) -> dict[str, list[float]]:
    """Seconds, one a round."""
    seconds: dict[str, list[float]] = {"embedded": [], "served": []}
    num_hit = setting.num_chunks * setting.chunk_tokens
    with (
        open_engine(msgspec.structs.replace(setting, server_url=None), enable_block_reuse=False) as embedded,
        open_engine(setting, enable_block_reuse=False) as served,
    ):
        tokens = embedded.tokenizer.encode(document())[: num_hit + 8]
        for number in range(num_rounds + 1):
            for name, engine in (("embedded", embedded), ("served", served)):
                answer = ask(engine, tokens, num_tokens=1)
                assert answer.num_memory_tokens == (num_hit if number else 0)
                seconds[name].append(answer.ttft_seconds)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="kvferry-bench-", dir="/dev/shm") as folder,
        ServerProcess(Path(folder), "--l1-size-gb", "0.5") as server,
    ):
        setting = Setting(arguments.model, f"{folder}/disk", arena_gb=0.5, server_url=server.url)
        seconds = measure(setting, arguments.rounds)
    figures = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(map(operator.truediv, seconds["served"], seconds["embedded"]))
    text = json.dumps({"seconds": seconds, "median_seconds": figures, "served / embedded": ratio})
    print(text)
    if arguments.json:
        arguments.json.write_text(text)
    table = Table("hit", "TTFT, s", title=f"1,800 tokens, median of {arguments.rounds}; served / embedded {ratio:.2f}")
    for name, figure in figures.items():
        table.add_row(name, f"{figure:.3f}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
