"""Show on a real model what each place that keeps KV saves.

Asks questions about one document of about 1,800 tokens: cold; with the document's KV in the engine's pool; after other
prompts pushed it out of the pool, so that it comes from host memory; and in a new process, where it comes from disk.
Checks every answer token by token against an engine that reuses nothing. Exit code 1: one was not the same.

examples:
  kvferry demo
  kvferry demo --out results --model ./my-model
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from kvferry.cli.demo.document import Prompts
    from kvferry.cli.demo.report import Step
    from kvferry.cli.demo.steps import Answer

STEPS = ("1 cold", "2 in the engine's pool", "3 in host memory", "4 on disk, new process")
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the chart goes, and another model."""
    parser.add_argument("--out", metavar="DIR", default="demo-out", help="folder for the chart (default %(default)s)")
    parser.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help="default %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Run all steps, print the table, save the chart."""
    from rich.console import Console

    from kvferry.cli.demo.report import make_table, save_chart

    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from error
    console = Console()
    with tempfile.TemporaryDirectory(prefix="kvferry-demo-") as disk_path:
        steps = _run_steps(arguments.model, disk_path, console)
    for step in steps:
        console.print(f"[bold]{step.question}[/] [dim]{step.answer.text.strip()}[/]", highlight=False)
    console.print(make_table(steps))
    chart = out / "ttft.png"
    save_chart(steps, chart)
    console.print(f"Chart: {chart}", highlight=False)
    return 0 if all(step.is_same for step in steps) else 1


def _run_steps(model: str, disk_path: str, console: Console) -> list[Step]:
    from kvferry.cli.demo.report import Step
    from kvferry.cli.demo.steps import POOL_TOKENS, Question, ask_in_new_process

    prompts, expected = _run_without_kvferry(model, console)
    answers = [*_run_in_one_engine(model, disk_path, prompts, console)]
    with _working(console, f"Step {STEPS[3]}"):
        answers.append(ask_in_new_process(Question(model, prompts.token_ids[3], POOL_TOKENS, disk_path)))
    return [
        Step(name, question, answer, is_same=answer.token_ids == reference.token_ids)
        for name, question, answer, reference in zip(STEPS, prompts.questions, answers, expected, strict=True)
    ]


def _run_without_kvferry(model: str, console: Console) -> tuple[Prompts, list[Answer]]:
    """The prompts, and what an engine answers that computes each of them from its first token."""
    from kvferry.cli.demo.document import make_prompts
    from kvferry.cli.demo.steps import CHUNK_TOKENS, NUM_CHUNKS, POOL_TOKENS, ask, open_engine
    from kvferry.errors import RequestError

    with _working(console, f"Loading {model}"):
        engine = open_engine(model, POOL_TOKENS, disk_path=None)
    with engine as llm:
        if not getattr(llm.tokenizer, "chat_template", None):
            raise RequestError(f"the demo needs a model with a tokenizer and a chat template; {model} has none")
        prompts = make_prompts(llm.tokenizer, NUM_CHUNKS * CHUNK_TOKENS)
        answers = []
        for question, token_ids in zip(prompts.questions, prompts.token_ids, strict=True):
            with _working(console, f"What to expect, with the cache off: {question}"):
                answers.append(ask(llm, token_ids))
    return prompts, answers


def _run_in_one_engine(model: str, disk_path: str, prompts: Prompts, console: Console) -> Iterator[Answer]:
    """Steps 1 to 3. The engine's end leaves everything on disk."""
    from kvferry.cli.demo.document import make_other_prompts
    from kvferry.cli.demo.steps import POOL_TOKENS, ask, open_engine

    with _working(console, f"Loading {model} with kvferry"):
        engine = open_engine(model, POOL_TOKENS, disk_path)
    with engine as llm:
        with _working(console, f"Step {STEPS[0]}"):
            yield ask(llm, prompts.token_ids[0])
        with _working(console, f"Step {STEPS[1]}"):
            yield ask(llm, prompts.token_ids[1])
        with _working(console, "Other prompts push the document out of the pool"):
            # Two of a little more than half the pool: the second finds no block free but the document's last ones.
            for token_ids in make_other_prompts(llm.tokenizer, 2, POOL_TOKENS * 11 // 20):
                ask(llm, token_ids, num_tokens=1)
        with _working(console, f"Step {STEPS[2]}"):
            yield ask(llm, prompts.token_ids[2])


@contextlib.contextmanager
def _working(console: Console, what: str) -> Iterator[None]:
    """Say what is being done: as a spinner in a terminal, as a line elsewhere."""
    if not console.is_terminal:
        console.print(f"{what} ...", highlight=False)
        yield
        return
    with console.status(f"{what} ..."):
        yield
