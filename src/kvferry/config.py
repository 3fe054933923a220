"""Every option of kvferry, and the only reader of the environment and of YAML. Knows nothing that options configure.

An option's type, which says its limits, and its one-line description stand at its field and nowhere else.
"""

from __future__ import annotations

import difflib
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from kvferry.errors import ConfigError

ENVIRONMENT_PREFIX = "KVFERRY_"
CONFIG_FILE_VARIABLE = "KVFERRY_CONFIG_FILE"

_PATHS = frozenset({"arena_dir", "disk_path", "client_secret"})
"""Options in which `~` means the user's home."""

Count = Annotated[int, Meta(ge=1)]
Size = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(gt=0, le=1)]


def option(default: Any, description: str) -> Any:
    """A field of an option class, whose type says its limits: its default, and one line about it."""
    metadata = {"description": description}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class _Options:
    """What every option class does with its values."""

    def __post_init__(self) -> None:
        """Replace each by its converted value. ConfigError: it has none."""
        for item in fields(self):
            value = _convert(type(self), item.name, getattr(self, item.name), f"of {type(self).__name__}")
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True, slots=True)
class StoreOptions(_Options):
    """Options of the store and of the presets `kvferry` and `kvferry-server`.

    Set by argument, by `KVFERRY_<NAME>` or in the YAML file that KVFERRY_CONFIG_FILE names: the first that sets an
    option wins (`load_options`). ConfigError: a value of another type or out of range.
    """

    chunk_tokens: Count = option(256, "tokens per chunk, a multiple of the engine's block size")
    l1_size_gb: Positive = option(4.0, "size of the arena in shared memory, in 10^9 bytes")
    eviction_policy: Literal["lru", "s3fifo"] = option("lru", "which chunks leave a full arena first")
    arena_dir: str | None = option(None, "folder of the arena; default a private folder of the user's in /dev/shm")
    disk_path: str | None = option(None, "folder of the disk tier; default none")
    disk_size_gb: Positive = option(20.0, "most that the disk tier may occupy, temporary files too, in 10^9 bytes")
    disk_threads: Count = option(2, "threads that read and write the disk tier")
    async_load: Literal["auto", "always", "never"] = option(
        "auto", "which loads take their request out of the batch; auto: those from lower tiers, and large ones"
    )
    async_load_bytes: Size = option(64_000_000, "bytes on one rank from which on a load is large")
    load_when: Literal["auto", "always"] = option(
        "auto", "which hits are loaded; auto: those that are expected to take no longer than to compute them"
    )
    max_load_bytes_in_flight: Size = option(
        8_000_000_000, "bytes on one rank that loads may wait for; beyond, hits are loaded only if known to be quicker"
    )
    load_deadline_seconds: NotNegative = option(2.0, "longest that a request waits for lower tiers; then it computes")
    close_deadline_seconds: NotNegative = option(10.0, "longest that closing waits for writes to lower tiers")
    server_url: str | None = option(None, "where the cache server is; default a socket in the user's runtime folder")
    server_key: str | None = option(None, "the cache server's public key, or a file that holds it; for TCP with keys")
    client_secret: str | None = option(None, "file of the key by which the cache server knows this client")
    connect_deadline_seconds: NotNegative = option(0.5, "longest that an engine's start waits for the cache server")
    match_deadline_seconds: Positive = option(0.02, "longest that a request waits for a server to say what it has")
    job_deadline_seconds: Positive = option(0.05, "longest that a request waits for a server to lease memory")
    log_level: Literal["debug", "info", "warning", "error"] = option("warning", "level of the logger `kvferry`")


@dataclass(frozen=True, slots=True)
class KvCacheConfig(_Options):
    """The embedded engine's pool. ConfigError: a value of another type or out of range."""

    tokens_per_block: Count = option(32, "tokens per block")
    max_tokens: Count | None = option(None, "most tokens that the pool holds; default what model and batch need")
    free_gpu_memory_fraction: Share | None = option(
        None, "most that the pool takes of a GPU's free or the machine's available memory; default 0.8 or 1 GB"
    )
    max_attention_window: tuple[int, ...] | None = option(
        None, "attention windows of the layers in turn, which must be the model's own; default those"
    )
    enable_block_reuse: bool = option(True, "whether requests share the pool's blocks of a common prefix")
    state_interval_tokens: Count = option(
        256, "tokens between kept states of recurrent layers, where passes over a prompt end; best the chunk_tokens"
    )
    max_loading_share: Share = option(0.5, "share of the pool that requests may hold while they load")
    transfer_deadline_seconds: Positive = option(
        30.0, "longest that the engine waits for a connector's asynchronous load or save"
    )


@dataclass(frozen=True, slots=True)
class KvCacheConnectorConfig(_Options):
    """Which connector an engine uses: a preset by name, or a module and its two classes.

    ConfigError: both, neither, or a module without both its classes.
    """

    connector: str | None = option(None, "preset by name; `kvferry connectors` lists them")
    connector_module: str | None = option(None, "module of any other connector")
    connector_scheduler_class: str | None = option(None, "name of its scheduler half")
    connector_worker_class: str | None = option(None, "name of its worker half")
    server_url: str | None = option(None, "for presets that talk to a server")
    options: Mapping[str, Any] = option(dict, "for the connector; the preset `kvferry` takes names of StoreOptions")

    def __post_init__(self) -> None:
        _Options.__post_init__(self)  # a dataclass with slots cannot say super()
        names = ("connector_module", "connector_scheduler_class", "connector_worker_class")
        given = [name for name in names if getattr(self, name) is not None]
        missing = [name for name in names if getattr(self, name) is None]
        if self.connector is not None and given:
            raise ConfigError(
                f"connector={self.connector!r} names a preset, but {_listed(given)} is given as well: "
                "give a preset, or a module with its two classes"
            )
        if self.connector is None and not given:
            raise ConfigError(f"neither connector (a preset's name) nor {_listed(names)} is given")
        if self.connector is None and missing:
            raise ConfigError(f"{_listed(given)} is given without {_listed(missing)}: a connector needs all three")


@dataclass(frozen=True, slots=True)
class EngineOptions(_Options):
    """The keyword arguments of `kvferry.LLM`, as an engine's YAML names them.

    ConfigError: a value of another type or out of range.
    """

    kv_cache_config: KvCacheConfig = option(KvCacheConfig, "the pool")
    kv_connector_config: KvCacheConnectorConfig | None = option(None, "the connector; default none")
    tensor_parallel_size: Count = option(1, "ranks that share the model's heads, one process and GPU each")
    rank_timeout_seconds: Positive = option(10.0, "a rank that shows no life for so long ends the engine")
    max_seq_len: Count | None = option(None, "most tokens of a prompt and its output; at most the model's, its default")
    max_batch_size: Count = option(8, "most requests that run at once")
    max_num_tokens: Count = option(8192, "most tokens of one forward pass")
    enable_chunked_prefill: bool = option(True, "whether a prompt may be spread over several forward passes")
    dtype: str = option("auto", "torch's name of the type of weights and pool, or auto")
    device: str = option("auto", "torch's name of the device, or auto")


@dataclass(frozen=True, slots=True)
class IgnoredKvCacheOptions:
    """Options of TensorRT-LLM's KvCacheConfig that change nothing here: accepted beside ours, checked, and dropped."""

    enable_partial_reuse: bool = option(True, "blocks are shared whole or not at all")
    copy_on_partial_reuse: bool = option(True, "likewise")
    use_kv_cache_manager_v2: bool | Literal["auto"] = option("auto", "there is one manager, with layer groups")
    host_cache_size: Annotated[int, Meta(ge=0, le=0)] | None = option(
        None, "the engine has no tier of its own: that is the connector's"
    )


@dataclass(frozen=True, slots=True)
class IgnoredEngineOptions:
    """Options of TensorRT-LLM's LLM that change nothing here: accepted beside ours, checked, and dropped."""

    backend: Literal["pytorch"] = option("pytorch", "there is one backend")
    cuda_graph_config: Mapping[str, Any] | None = option(None, "passes are not captured")
    disable_overlap_scheduler: bool = option(False, "a pass is scheduled when the one before has ended")
    trust_remote_code: bool = option(False, "models are transformers' own")
    pipeline_parallel_size: Annotated[int, Meta(ge=1, le=1)] = option(1, "every rank has all layers")


_IGNORED: Mapping[Any, Any] = {KvCacheConfig: IgnoredKvCacheOptions, EngineOptions: IgnoredEngineOptions}


@dataclass(frozen=True, slots=True)
class Setting:
    """One option as it took effect. source: `argument`, the environment variable's name, the YAML file's path, or
    `default`."""

    name: str
    value: object
    source: str
    description: str


def load_options(arguments: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> StoreOptions:
    """The options of the store: `arguments`, then the environment, then YAML, then defaults.

    environ: stands for `os.environ` if given. ConfigError: an unknown name (with the nearest known one), a value of
    another type or out of range, or a file that cannot be read; the message names the source.
    """
    values: dict[str, Any] = {setting.name: setting.value for setting in explain_options(arguments, environ)}
    return StoreOptions(**values)


def explain_options(
    arguments: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> list[Setting]:
    """The same as settings, in the order of the fields, each with where it came from. Errors as `load_options`."""
    environ = os.environ if environ is None else environ
    chosen = {item.name: (item.default, "default") for item in fields(StoreOptions)}
    path = environ.get(CONFIG_FILE_VARIABLE)
    if path:
        from_file = accept_options(StoreOptions, _read_yaml(Path(path).expanduser()), f"in {path}")
        chosen |= {name: (value, path) for name, value in from_file.items()}
    for name, (variable, text) in _environment(environ).items():
        chosen[name] = (_convert(StoreOptions, name, text, f"from {variable}", strict=False), variable)
    given = accept_options(StoreOptions, arguments or {}, "given as argument")
    chosen |= {name: (value, "argument") for name, value in given.items()}
    return [Setting(item.name, *chosen[item.name], item.metadata["description"]) for item in fields(StoreOptions)]


def read_engine_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keyword arguments of `kvferry.LLM` that an engine's YAML sets, as objects, in TensorRT-LLM's names.

    ConfigError: as `load_options`.
    """
    return accept_options(EngineOptions, _read_yaml(Path(path).expanduser()), f"in {path}")


def accept_options(cls: Any, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of class `cls` among `values`, converted. Those that TensorRT-LLM has and that change nothing here
    are checked and left out. ConfigError: an unknown name or a wrong value; `where` says in the message where it is."""
    ignored = _IGNORED.get(cls)
    without_effect = _hints(ignored) if ignored is not None else {}
    _refuse_unknown(values, [*_hints(cls), *without_effect], where)
    for name in values.keys() & without_effect.keys():
        _convert(ignored, name, values[name], where)
    return {name: _convert(cls, name, value, where) for name, value in values.items() if name in _hints(cls)}


def has_variable(name: str) -> bool:
    """Whether the environment sets a variable, which somebody else reads, to something."""
    return bool(os.environ.get(name))


def default_server_url(environ: Mapping[str, str] | None = None) -> str:
    """The user's own cache server: a socket in the folder that the system made for the user, or a folder like it."""
    environ = os.environ if environ is None else environ
    folder = environ.get("XDG_RUNTIME_DIR")
    private = Path(folder, "kvferry") if folder else Path(tempfile.gettempdir(), f"kvferry-{os.getuid()}")
    return f"ipc://{private / 'server.sock'}"


def _environment(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Option name to (variable, text). A variable that is set but empty counts as not set."""
    found = {
        variable.removeprefix(ENVIRONMENT_PREFIX).lower(): (variable, text)
        for variable, text in environ.items()
        if variable.startswith(ENVIRONMENT_PREFIX) and variable != CONFIG_FILE_VARIABLE
    }
    _refuse_unknown(found, _hints(StoreOptions), f"in the environment (as {ENVIRONMENT_PREFIX}<NAME>)")
    return {name: (variable, text) for name, (variable, text) in found.items() if text}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # most commands read none

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"{path} holds no mapping of option names to values")
    return content


def _refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ConfigError(f"unknown option {name!r} {where}; {hint}known: {', '.join(known)}")


def _convert(cls: Any, name: str, value: Any, where: str, *, strict: bool = True) -> Any:
    """`value` in the type of the field `name`; texts of the environment are parsed with strict=False."""
    hint = _hints(cls)[name]
    nested: Any = next((item for item in (hint, *get_args(hint)) if is_dataclass(item)), None)  # alone or as `X | None`
    if nested is not None and isinstance(value, nested):
        return value
    if nested is not None and isinstance(value, Mapping):
        below = f"{where}, under {name}"
        converted_below = accept_options(nested, value, below)
        try:
            return nested(**converted_below)
        except ConfigError as error:
            raise ConfigError(f"{below}: {error}") from error
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    try:
        converted = msgspec.convert(value, hint, strict=strict)
    except msgspec.ValidationError as error:
        message = str(error)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        reason = f"expected one of {', '.join(choices)}" if choices else message[:1].lower() + message[1:]
        raise ConfigError(f"option {name!r} {where} is {value!r}: {reason}") from error
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ConfigError(f"option {name!r} {where} is {value!r}: expected a finite number")
    return str(Path(converted).expanduser()) if name in _PATHS and converted else converted


@cache
def _hints(cls: Any) -> Mapping[str, Any]:
    """The type of each field of an option class, with its limits."""
    resolved = get_type_hints(cls, include_extras=True)
    return {item.name: resolved[item.name] for item in fields(cls)}


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
