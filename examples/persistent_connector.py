"""Run the persistent connector, named the way an engine names a connector of your own.

    python examples/persistent_connector.py MODEL FOLDER [PROMPT]

MODEL is a folder, a .gguf file or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct. Run it twice: the second run
takes the prompt's KV from FOLDER. The connector itself, to copy from, is src/kvferry/connector/persistent.py.
"""

from __future__ import annotations

import sys

from kvferry import LLM, KvCacheConnectorConfig, SamplingParams

PROMPT = "A ferry carries people and goods across water. " * 20 + "A ferry"


def main(model: str, folder: str, prompt: str = PROMPT) -> None:
    connector = KvCacheConnectorConfig(
        connector_module="kvferry.connector.persistent",
        connector_scheduler_class="PersistentConnectorScheduler",
        connector_worker_class="PersistentConnectorWorker",
        options={"folder": folder},
    )
    with LLM(model, kv_connector_config=connector) as llm:
        output = llm.generate(prompt, SamplingParams(max_tokens=24))
    metrics = output.metrics
    print(output.text)
    print(
        f"{metrics.num_prompt_tokens} prompt tokens: {metrics.num_connector_tokens} loaded from {folder}, "
        f"{metrics.num_computed_tokens} computed; first token after {metrics.ttft_seconds or 0:.3f} s"
    )


if __name__ == "__main__":
    if len(sys.argv) not in {3, 4}:
        sys.exit(__doc__)
    main(*sys.argv[1:])
