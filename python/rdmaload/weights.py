"""Which files of a model hold its weights: one rule for saving, loading and pulling.

Weight files are the root-level `*.safetensors`. When a root-level `*.safetensors.index.json` lies
beside them, only the files that it names count: repositories carry a second copy of the weights for
another engine often enough. Any other safetensors file is carried as a plain file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from rdmaload.errors import FormatError

__all__ = ["MAX_WEIGHT_INDEX_BYTES", "WEIGHT_INDEX_SUFFIX", "WEIGHT_SUFFIXES", "has_weight_suffix", "weight_files_of"]

WEIGHT_SUFFIXES = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")
"""Endings of files that hold weights in any format; `pull_files` leaves them out unless asked."""

WEIGHT_INDEX_SUFFIX = ".safetensors.index.json"
"""Ending of files that say which weight file holds a tensor."""

_MAIN_INDEX = "model.safetensors.index.json"

MAX_WEIGHT_INDEX_BYTES = 100_000_000
"""The longest `*.safetensors.index.json` that is read; safetensors' own limit for headers."""


def has_weight_suffix(path: str) -> bool:
    """Whether the name says that the file holds weights, in safetensors or any other format."""
    return path.endswith(WEIGHT_SUFFIXES)


def weight_files_of(paths: Collection[str], read: Callable[[str], bytes], *, url: str | None = None) -> list[str]:
    """The weight files among `paths`, sorted; `read` gives a `*.safetensors.index.json`.

    With several such files `model.safetensors.index.json` decides, and without it all of them
    together. Raises FormatError when one cannot be read, or names a file that is not there: half a
    model is not a model.
    """
    root = [path for path in paths if "/" not in path]
    indices = sorted(path for path in root if path.endswith(WEIGHT_INDEX_SUFFIX))
    if not indices:
        return sorted(path for path in root if path.endswith(".safetensors"))
    if _MAIN_INDEX in indices:
        indices = [_MAIN_INDEX]
    present = frozenset(paths)
    named: set[str] = set()
    for index in indices:
        files = _files_named_by(index, read(index), url)
        missing = sorted(files - present)
        if missing:
            raise FormatError(
                f"{index} names {missing[0]}, which is not there ({len(missing)} of {len(files)} "
                "files are missing): the copy of the model is incomplete",
                url=url,
                key=missing[0],
            )
        named |= files
    return sorted(named)


def _files_named_by(index: str, content: bytes, url: str | None) -> set[str]:
    from rdmaload import _core

    problem = f"it has more than {MAX_WEIGHT_INDEX_BYTES} bytes"
    if len(content) <= MAX_WEIGHT_INDEX_BYTES:
        try:
            return _core.files_of_weight_map(content)
        except FormatError as err:
            problem = str(err)
    raise FormatError(f"{index} cannot be used: {problem}", url=url, key=index)
