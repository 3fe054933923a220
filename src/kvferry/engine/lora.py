"""LoRA adapters, through peft: loaded once, named by content, switched per forward pass. Knows no request."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import xxhash

from kvferry.errors import RequestError

_CONFIG = "adapter_config.json"


def adapter_digest(folder: str) -> str:
    """Names an adapter by the content of its files. RequestError: the folder is no adapter, or peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise RequestError("LoRA adapters need the package peft: pip install kvferry[lora]")
    files = sorted(path for path in Path(folder).expanduser().glob("adapter_*") if path.is_file())
    if _CONFIG not in {path.name for path in files}:
        raise RequestError(f"{folder} is no LoRA adapter: it has no {_CONFIG}")
    digest = xxhash.xxh3_128()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode())
        digest.update(content)
    return f"lora-{digest.hexdigest()}"


class Adapters:
    """The adapters of one model. Called from the engine's loop alone: a model must not change under a forward pass."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._loaded: set[str] = set()
        self._active: str | None = None

    def load(self, lora_id: str, folder: str) -> None:
        """Load an adapter unless it is there. RequestError: it does not fit the model."""
        if lora_id in self._loaded:
            return
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are the point
                self._model.load_adapter(str(Path(folder).expanduser()), adapter_name=lora_id)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise RequestError(f"the LoRA adapter {folder} cannot be loaded: {error}") from error
        self._loaded.add(lora_id)
        self._switch(self._active)

    def activate(self, lora_id: str | None) -> None:
        """Let the next forward pass use this adapter, or none."""
        if lora_id != self._active:
            self._switch(lora_id)

    def _switch(self, lora_id: str | None) -> None:
        if lora_id is None:
            self._model.disable_adapters()
        else:
            self._model.set_adapter(lora_id)
            self._model.enable_adapters()
        self._active = lora_id
