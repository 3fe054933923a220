"""Names what vLLM's KV depends on besides tokens: weights, adapters, contents of prompts. None: it cannot be named, and
nothing may be kept. Knows no tensor of the cache and no store.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any, Final

from kvferry.integrations.weights import name_weights
from kvferry.store.keys import Content, Extras

logger = logging.getLogger(__name__)

FORMAT: Final = 1
"""To be raised whenever the meaning of kept bytes changes without any other field of the identity changing."""

_READABLE_FORMATS = {"auto", "hf", "safetensors", "fastsafetensors", "pt", "gguf", "bitsandbytes", "mistral"}
_VOLATILE_CONFIG = {"_name_or_path", "_attn_implementation_internal", "transformers_version", "architectures"}


def engine_identity(vllm_config: Any, version: str) -> str | None:
    """Names weights, types, partition and vLLM's version. Weights that are no snapshot of the hub's are read whole."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    if getattr(cache, "calculate_kv_scales", False):
        return None  # Scales that depend on the first request.
    weights = _weights(model, str(vllm_config.load_config.load_format))
    if weights is None:
        return None
    config = {name: value for name, value in model.hf_config.to_dict().items() if name not in _VOLATILE_CONFIG}
    fields = {
        "format": FORMAT,
        "vllm": version,
        "weights": weights,
        "config": config,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "cache_dtype": str(cache.cache_dtype),
        "skipped_layers": [str(layer) for layer in getattr(cache, "kv_cache_dtype_skip_layers", None) or ()],
        "max_model_len": model.max_model_len if "rope" in json.dumps(config, default=str).lower() else None,
        "draft": str(getattr(vllm_config.speculative_config, "model", None)),
        "ranks": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
        "attention": str(getattr(getattr(vllm_config, "attention_config", None), "backend", None)),
    }
    return json.dumps(fields, sort_keys=True, default=str)


def request_extras(request: Any, adapter: str | None) -> Extras | None:
    """What names a request's KV besides its tokens, or None. adapter: the content id of its LoRA adapter, if any."""
    if request.prompt_embeds is not None or request.resumable or (request.lora_request is not None and adapter is None):
        return None
    contents = []
    for feature in request.mm_features or ():
        if not feature.identifier:
            return None
        start = feature.mm_position.offset
        name = f"{feature.modality} {feature.identifier}"
        contents.append(Content(name, start, start + feature.mm_position.length))
    return Extras(cache_salt=request.cache_salt or None, lora_id=adapter, contents=tuple(contents))


class Adapters:
    """Content ids of LoRA adapters. An adapter's files are read in a thread, and until then it has no name."""

    def __init__(self) -> None:
        self._names: dict[tuple[Any, ...], str | None] = {}

    def name(self, lora_request: Any) -> str | None:
        """None: it has no name, or not yet. Files that changed are another adapter."""
        folder = Path(lora_request.lora_path)
        try:
            files = sorted(path for path in folder.glob("adapter_*") if path.is_file())
            stamp = (folder, *((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))
        except OSError:
            return None
        if stamp not in self._names:
            self._names[stamp] = None
            if any(path.name == "adapter_config.json" for path in files):
                threading.Thread(target=self._read, args=(stamp,), name="kvferry-adapter", daemon=True).start()
        return self._names[stamp]

    def _read(self, stamp: tuple[Any, ...]) -> None:
        try:
            self._names[stamp] = name_weights(str(stamp[0]))
        except OSError as error:
            logger.warning("requests with the adapter %s are not kept: %s", stamp[0], error)


def _weights(model: Any, load_format: str) -> str | None:
    """A name of the weights, or None."""
    name = load_format.rsplit(".", 1)[-1].lower()
    if name == "dummy":
        return f"dummy {model.seed}"
    return name_weights(model.model, model.revision) if name in _READABLE_FORMATS else None
