"""Writes a model's files into a directory, each whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from rdmaload.connectors.local import LocalConnector
from rdmaload.index import IndexFile
from rdmaload.urls import parse_url

__all__ = ["pull"]


def pull(files: Iterable[tuple[IndexFile, Iterator[memoryview]]], directory: Path) -> None:
    """Write the files; their paths were checked when the index was decoded, and stay inside `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    with LocalConnector(parse_url(directory.absolute())) as target:
        for file, blocks in files:
            target.write(file.path, file.size, blocks)
