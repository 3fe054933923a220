"""vLLM with kvferry, offline: asks about a document, starts vLLM anew, asks again; the second time it comes from disk.

    python examples/vllm_twice.py MODEL [DOCUMENT]

Needs vLLM and kvferry in one environment. On CPUs, set VLLM_CPU_KVCACHE_SPACE to the GB of vLLM's own pool, such as 2.
docs/vllm.md says how to serve with it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path


def ask(model: str, document: str) -> None:
    from vllm import LLM, SamplingParams

    transfer = {
        "kv_connector": "KVFerryConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"l1_size_gb": 2, "disk_path": "kv-cache"},
    }
    llm = LLM(model, kv_transfer_config=transfer, max_model_len=8192, enforce_eager=True)
    question = f"{document}\n\nWhat is this document about, in one sentence?"
    start = time.perf_counter()
    (answer,) = llm.generate([question], SamplingParams(max_tokens=40, temperature=0), use_tqdm=False)
    seconds = time.perf_counter() - start
    print(f"{seconds:.2f} s, {answer.num_cached_tokens} tokens from the cache:{answer.outputs[0].text}")
    llm.llm_engine.engine_core.shutdown()  # The end of a process waits for vLLM's before it ends them.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("document", type=Path, nargs="?", default=Path(__file__).parents[1] / "README.md")
    given = parser.parse_args()
    for _ in range(2):
        engine = multiprocessing.get_context("spawn").Process(
            target=ask, args=(given.model, given.document.read_text(encoding="utf-8")[:12_000])
        )
        engine.start()
        engine.join()
        if engine.exitcode:
            raise SystemExit(engine.exitcode)


if __name__ == "__main__":
    main()
