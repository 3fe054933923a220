"""Show on a real model what each place that keeps KV saves.

Asks questions about one document of about 1,800 tokens: cold; with the document's KV in the engine's pool; after other
prompts pushed it out of the pool, so that it comes from host memory; in a new process, where it comes from disk; and in
an engine that never saw it, from the memory of a cache server that another engine filled. Checks every answer token by
token against an engine that reuses nothing. Exit code 1: one was not the same.

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

from kvferry.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from kvferry.cli.demo.document import Prompts
    from kvferry.cli.demo.report import Step
    from kvferry.cli.demo.steps import Answer, Setting

STEPS = ("1 cold", "2 engine's pool", "3 host memory", "4 disk, restarted", "5 cache server")
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the chart goes, and another model."""
    parser.add_argument("--out", metavar="DIR", default="demo-out", help="folder for the chart (default %(default)s)")
    parser.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help="default %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Run all steps, print the table, save the chart."""
    from rich.console import Console
    from rich.markup import escape

    from kvferry.cli.demo.report import make_table, save_chart
    from kvferry.cli.demo.steps import Setting

    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from error
    console = Console()
    with tempfile.TemporaryDirectory(prefix="kvferry-demo-") as disk_path:
        steps = _run_steps(Setting(arguments.model, disk_path), console)
    for step in steps:
        answer = escape(" ".join(step.answer.text.split()))
        console.print(f"[bold]{step.question}[/] [dim]{answer} ...[/]", highlight=False)
    console.print(make_table(steps))
    chart = out / "ttft.png"
    save_chart(steps, chart)
    console.print(f"Chart: {chart}", highlight=False, soft_wrap=True)  # a path is to be copied
    return 0 if all(step.is_same for step in steps) else 1


def _run_steps(setting: Setting, console: Console) -> list[Step]:
    from kvferry.cli.demo.report import Step
    from kvferry.cli.demo.steps import Question, ask_in_new_process

    prompts, expected = _run_without_reuse(setting, console)
    answers = [*_run_in_one_engine(setting, prompts, console)]
    with _working(console, f"Step {STEPS[3]}"):
        answers.append(ask_in_new_process(Question(setting, prompts.token_ids[3])))
    with _working(console, "Starting a cache server"), _cache_server(setting) as shared:
        with _working(console, "An engine fills the server: it computes the document and ends"):
            ask_in_new_process(Question(shared, prompts.token_ids[0]))
        with _working(console, f"Step {STEPS[4]}: another engine"):
            answers.append(ask_in_new_process(Question(shared, prompts.token_ids[4])))
    return [
        Step(name, question, answer, is_same=answer.token_ids == reference.token_ids)
        for name, question, answer, reference in zip(STEPS, prompts.questions, answers, expected, strict=True)
    ]


@contextlib.contextmanager
def _cache_server(setting: Setting) -> Iterator[Setting]:
    """The setting of engines that use a server, which runs meanwhile in a process of its own."""
    import msgspec

    from kvferry.testing.servers import ServerProcess

    arguments = ["--l1-size-gb", str(setting.arena_gb), "--chunk-size", str(setting.chunk_tokens)]
    with (
        tempfile.TemporaryDirectory(prefix="kvferry-demo-", dir="/dev/shm") as folder,
        ServerProcess(Path(folder), *arguments) as server,
    ):
        yield msgspec.structs.replace(setting, server_url=server.url)


def _run_without_reuse(setting: Setting, console: Console) -> tuple[Prompts, list[Answer]]:
    """The prompts, and what an engine answers that computes each of them from its first token."""
    from kvferry.cli.demo.document import make_prompts
    from kvferry.cli.demo.steps import ask, open_engine

    with _working(console, f"Loading {setting.model}"):
        engine = open_engine(setting, with_kvferry=False, enable_block_reuse=False)
    with engine as llm:
        if not getattr(llm.tokenizer, "chat_template", None):
            raise RequestError(f"the demo needs a tokenizer with a chat template, and {setting.model} has none")
        prompts = make_prompts(llm.tokenizer, setting.num_chunks * setting.chunk_tokens)
        answers = []
        for question, token_ids in zip(prompts.questions, prompts.token_ids, strict=True):
            with _working(console, f"What to expect, with the cache off: {question}"):
                answers.append(ask(llm, token_ids, setting.num_generated_tokens))
    return prompts, answers


def _run_in_one_engine(setting: Setting, prompts: Prompts, console: Console) -> Iterator[Answer]:
    """Steps 1 to 3. The engine's end leaves everything on disk."""
    from kvferry.cli.demo.document import make_other_prompts
    from kvferry.cli.demo.steps import ask, open_engine

    with _working(console, f"Loading {setting.model} with kvferry"):
        engine = open_engine(setting)
    with engine as llm:
        for index in range(2):
            with _working(console, f"Step {STEPS[index]}"):
                yield ask(llm, prompts.token_ids[index], setting.num_generated_tokens)
        with _working(console, "Other prompts push the document out of the pool"):
            # Two of a little more than half the pool: the second finds no block free but the document's last ones.
            for token_ids in make_other_prompts(llm.tokenizer, 2, setting.pool_tokens * 11 // 20):
                ask(llm, token_ids, num_tokens=1)
        with _working(console, f"Step {STEPS[2]}"):
            yield ask(llm, prompts.token_ids[2], setting.num_generated_tokens)


@contextlib.contextmanager
def _working(console: Console, what: str) -> Iterator[None]:
    """Say what is being done: as a spinner in a terminal, as a line elsewhere."""
    if not console.is_terminal:
        console.print(f"{what} ...", highlight=False)
    with console.status(f"{what} ..."):
        yield
