"""What a model that an engine saves per rank carries besides tensors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rdmaload import loading
from rdmaload.errors import NotSupportedError
from rdmaload.integrations import metadata
from rdmaload.weights import weight_files_of

__all__ = ["collect_files"]


def collect_files(source: Path, target: Path) -> None:
    """Copy the checkpoint's other files and the headers of its weight files (see metadata.py) into `target`."""
    if not source.is_dir():
        raise NotSupportedError(f"{source} is no directory: give a directory or a url to save the ranks' weights from")
    if _only_headers(source):
        ignored = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json")
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
        headers = [(path.name, path.read_bytes()) for path in sorted(source.glob("*.safetensors"))]
    else:
        with loading.open(source) as model:
            model.pull_files(target, ignore_pattern="*.safetensors.index.json")
            headers = [(file.path, metadata.header_file(file)) for file in model.files if file.header is not None]
    metadata.write_kept_headers(headers, target)


def _only_headers(directory: Path) -> bool:
    """Whether the weight files of a directory are those that metadata.py has written."""
    listed = weight_files_of(
        sorted(os.listdir(directory)), lambda path: (directory / path).read_bytes(), url=str(directory)
    )
    for path in listed:
        with (directory / path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if os.fstat(file.fileno()).st_size == 8 + length:
                return True
    return not listed
