"""Names what vLLM's KV depends on besides tokens: weights, adapters, contents of prompts. None: it cannot be named, and
nothing may be kept. Knows no tensor of the cache and no store.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import threading
from pathlib import Path
from typing import Any, Final

import xxhash

from kvferry.store.keys import Content, Extras

logger = logging.getLogger(__name__)

FORMAT: Final = 1
"""To be raised whenever the meaning of kept bytes changes without any other field of the identity changing."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_READABLE_FORMATS = {"auto", "hf", "safetensors", "fastsafetensors", "pt", "gguf", "bitsandbytes", "mistral", "dummy"}
_VOLATILE_CONFIG = {"_name_or_path", "_attn_implementation_internal", "transformers_version", "architectures"}
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")
_DIGESTS = Path("~/.cache/kvferry/digests")
_CHUNK_BYTES = 1 << 24


def engine_identity(vllm_config: Any, version: str) -> str | None:
    """Names weights, types, partition and vLLM's version. Reads all weights' bytes the first time: 1 s for some GB."""
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
                target = self._read
                threading.Thread(target=target, args=(stamp, files), name="kvferry-adapter", daemon=True).start()
        return self._names[stamp]

    def _read(self, stamp: tuple[Any, ...], files: list[Path]) -> None:
        try:
            self._names[stamp] = "lora-" + _digest_of([(path.name, _file_digest(path)) for path in files])
        except OSError as error:
            logger.warning("requests with the adapter %s are not kept: %s", stamp[0], error)


def _weights(model: Any, load_format: str) -> str | None:
    """A digest of the bytes of all weight files."""
    if load_format.rsplit(".", 1)[-1].lower() not in _READABLE_FORMATS:
        return None
    if load_format.rsplit(".", 1)[-1].lower() == "dummy":
        return f"dummy {model.seed}"
    folder = _folder(model)
    if folder is None:
        return None
    files = [folder] if folder.is_file() else [path for path in folder.iterdir() if path.suffix in _WEIGHTS]
    return _digest_of(sorted((path.name, _file_digest(path)) for path in files)) if files else None


def _folder(model: Any) -> Path | None:
    """Where vLLM found the model's files on this machine."""
    path = Path(model.model)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    except Exception as error:  # noqa: BLE001 - a foreign library that looks for what may be anywhere
        logger.debug("the files of %s are not found: %s", model.model, error)
        return None


def _file_digest(path: Path) -> str:
    """Of all bytes; a file of the hub's cache bears their SHA-256 as its name. Kept between runs by size and time."""
    real = path.resolve()
    if real.parent.name == "blobs" and _HUB_BLOB.fullmatch(real.name):
        return real.name
    status = real.stat()
    stamp = f"{real} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
    kept = _DIGESTS.expanduser() / xxhash.xxh3_128_hexdigest(stamp.encode("utf-8", "surrogateescape"))
    try:
        return kept.read_text(encoding="ascii")
    except (OSError, ValueError):
        digest = _read_digest(real)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False, encoding="ascii") as file:
            file.write(digest)
        Path(file.name).replace(kept)
    except OSError as error:
        logger.debug("the digest of %s is not kept: %s", real, error)
    return digest


def _read_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _digest_of(names: list[tuple[str, str]]) -> str:
    return xxhash.xxh3_128_hexdigest(repr(names).encode())
