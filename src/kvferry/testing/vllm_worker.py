"""What benchmarks bring into vLLM's workers: random weights with which an answer depends on the whole prompt, a pool
that can be wiped, and a connector that lies, which shows that these two find it out.

vLLM imports it by the names in `vllm_modes`. Knows nothing of what is measured.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.model_executor.model_loader import DummyModelLoader


def draw_weights(_loader: Any, model: torch.nn.Module, _model_config: Any) -> None:
    """Normal weights as wide as keeps the size of what goes through a layer; the same for a name in every process.

    vLLM's own dummy weights are so small that the answer is the same whatever lies in the KV cache. Wider ones than
    these make a deep model amplify the rounding of bfloat16, until a hit answers otherwise than a cold run.
    """
    for name, weight in model.named_parameters():
        if weight.dim() < 2:  # a norm's weights, or a bias
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
            weight.data.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)


# Under the name "dummy", as kvferry keeps nothing of weights that it cannot name. After the load it would be too late:
# linear layers on CPUs have packed their weights away by then.
DummyModelLoader.load_weights = draw_weights


class PoolWiper:
    """Mixed into vLLM's worker: `worker_extension_cls`."""

    model_runner: Any

    def wipe_pool(self) -> None:
        """Zero all of the KV cache, once the copies that were submitted from it have ended."""
        _wait_for_device()
        with torch.inference_mode():
            for layer in self.model_runner.kv_caches:
                for tensor in layer if isinstance(layer, (list, tuple)) else [layer]:
                    tensor.zero_()
        _wait_for_device()


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class LyingConnector(ExampleConnector):
    """Finds what vLLM's ExampleConnector finds, and says that it is loaded."""

    def start_load_kv(self, forward_context: Any, **_more: Any) -> None:
        """Load nothing."""
