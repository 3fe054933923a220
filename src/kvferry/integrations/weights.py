"""Names a model's weights by content, for engines that do not. Knows no engine and loads no model."""

from __future__ import annotations

from pathlib import Path

import xxhash

_CONTENT = {".bin", ".gguf", ".json", ".model", ".pt", ".pth", ".safetensors"}
_PIECE_BYTES = 1 << 22


def name_weights(model: str, revision: str | None = None) -> str | None:
    """The commit of a snapshot of the hub, or a digest of a folder's files: weights, configuration and tokenizer, which
    are read for it. None: there is no such folder, and the hub's cache has no such model."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        found = _find_snapshot(model, revision)
        if found is None:
            return None
        folder = found
    if folder.parent.name == "snapshots":
        return f"{folder.parents[1].name}@{folder.name}"
    files = sorted(path for path in folder.iterdir() if path.suffix in _CONTENT and path.is_file())
    return f"files-{_digest(files)}" if any(path.suffix != ".json" for path in files) else None


def _find_snapshot(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name of a model
        return None


def _digest(files: list[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(f"{len(path.name)} {path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()
