"""Generate text with the embedded engine.

MODEL is a folder in the layout of Hugging Face, a .gguf file, or a name on the hub. The text goes to standard output
as it comes; how long it took and where the prompt's KV came from goes to standard error.

examples:
  kvferry generate HuggingFaceTB/SmolLM2-135M-Instruct --chat -p "Why is the sky blue?"
  kvferry generate ./model -p "Once upon a time" --max-tokens 100 --connector kvferry
  kvferry generate ./model -p - --config engine.yaml < prompt.txt

engine.yaml holds the keyword arguments of kvferry.LLM, as TensorRT-LLM writes them:
  kv_cache_config:
    tokens_per_block: 32
  kv_connector_config:
    connector: kvferry
  max_batch_size: 8
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from kvferry.cli.engine import add_engine_arguments, engine_options, set_up_output

if TYPE_CHECKING:
    from kvferry import LLM, RequestOutput, SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, prompt, sampling and engine."""
    add_engine_arguments(parser)
    parser.add_argument("-p", "--prompt", required=True, help="text to go on from; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="put the prompt to the model as a user's message")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=128, help="most tokens to generate (default %(default)s)")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    sampling.add_argument("--top-k", type=int, default=0, help="draw among the k most likely tokens (0: all)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="draw among tokens of this total probability")
    sampling.add_argument("--seed", type=int, help="makes draws repeatable")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past the model's end token")


def run(arguments: argparse.Namespace) -> int:
    """Stream one completion."""
    from kvferry import LLM, SamplingParams
    from kvferry.engine.text import chat_tokens

    set_up_output()
    params = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        ignore_eos=arguments.ignore_eos,
    )
    options = engine_options(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with LLM(arguments.model, **options) as llm:
        if arguments.chat:
            prompt = chat_tokens(llm.tokenizer, [{"role": "user", "content": prompt}])
        output = _stream(llm, prompt, params)
    print(_summary(output), file=sys.stderr)
    return 0


def _stream(llm: LLM, prompt: str | list[int], params: SamplingParams) -> RequestOutput:
    printed = 0
    handle = llm.generate_async(prompt, params)
    for output in handle:
        print(output.text[printed:], end="", flush=True)
        printed = len(output.text)
    print()
    return handle.result()


def _summary(output: RequestOutput) -> str:
    metrics = output.metrics
    return (
        f"prompt {metrics.num_prompt_tokens} tokens ({metrics.num_pool_tokens} from the pool, "
        f"{metrics.num_connector_tokens} from the connector, {metrics.num_computed_tokens} computed); "
        f"first token after {metrics.ttft_seconds or 0:.3f} s; "
        f"{len(output.token_ids)} tokens in {metrics.duration_seconds or 0:.3f} s ({output.finish_reason})"
    )
