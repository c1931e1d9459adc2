"""Fuzzing of what is parsed in Python: the manifest and the index.

    python -m tests.fuzz.documents manifest [libFuzzer options] [corpus directories]

runs a target under atheris (coverage-guided; it has wheels for CPython on Linux only, so it is no dependency of the
tests). `TARGETS` are plain functions: tests/python/test_fuzz_documents.py runs them over the corpus and under
Hypothesis, which needs neither atheris nor coverage.

A target takes any bytes. Whatever they are, only errors of rdmaload come out, memory stays within a multiple of the
input's size, and what is accepted is exactly what encoding it again gives.
"""

from __future__ import annotations

import importlib
import json
import sys
import tracemalloc
from collections.abc import Callable

from rdmaload._core import crc32c
from rdmaload.errors import FormatError, IntegrityError, NotSupportedError
from rdmaload.index import Index
from rdmaload.manifest import Manifest

__all__ = ["TARGETS", "bounded"]

Target = Callable[[bytes], None]

# The costliest text is a list of empty objects: 3 bytes of it are a dictionary of 64.
BYTES_PER_BYTE = 64
BYTES_BESIDES = 1 << 20  # regular expressions that are compiled the first time, tracebacks


def manifest(data: bytes) -> None:
    """As it is, and sealed with the checksum that makes its text a manifest."""
    line = data.replace(b"\n", b" ") + b"\n"
    for value in (data, line + b"%08x\n" % crc32c(line)):
        try:
            found = Manifest.decode(value, url="redis://host/m", key="m/manifest")
        except (FormatError, IntegrityError, NotSupportedError) as err:
            check_text(err, "manifest m/manifest at redis://host/m: ")
            continue
        assert found.encode() == value


def index(data: bytes) -> None:
    """As it is, and behind a prefix whose first length is right."""
    cut = data.find(b"\n")  # what is before the first line feed is the list of files
    meta, tail = (data, b"") if cut < 0 else (data[:cut], data[cut + 1 :])
    for value in (data, b"RDMALOAD\x01\0\0\0" + len(meta).to_bytes(4, "little") + meta + tail):
        try:
            found = Index.decode(value)
        except (FormatError, NotSupportedError) as err:
            check_text(err, "index: ")
            continue
        # The list of files has more than one spelling, but each gives the same index.
        again = found.encode()
        assert Index.decode(again) == found
        assert found.total_chunks * 4 == len(found.crcs) <= len(value)
        if json.loads(meta_of(again)) == json.loads(meta_of(value)):
            assert again[16 + len(meta_of(again)) :] == value[16 + len(meta_of(value)) :]


def check_text(error: Exception, prefix: str) -> None:
    """What it says begins with where, and does not repeat a hostile document at length."""
    text = str(error)
    assert text.startswith(prefix)
    assert len(text) < 2000, text


def meta_of(value: bytes) -> bytes:
    return value[16 : 16 + int.from_bytes(value[12:16], "little")]


TARGETS: dict[str, Target] = {"manifest": manifest, "index": index}


def bounded(target: Target, data: bytes) -> None:
    """Run `target`, and fail when it had more memory at once than its input may cost."""
    tracemalloc.start()
    try:
        target(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= BYTES_PER_BYTE * len(data) + BYTES_BESIDES, f"{peak} bytes for an input of {len(data)}"


def main() -> None:
    import atheris

    target = TARGETS[sys.argv.pop(1)]
    # Once more, so that atheris sees what is covered; the errors stay the same classes.
    modules = ("rdmaload.index", "rdmaload.manifest")
    for name in modules:
        del sys.modules[name]
    with atheris.instrument_imports(include=list(modules)):
        globals()["Index"] = importlib.import_module("rdmaload.index").Index
        globals()["Manifest"] = importlib.import_module("rdmaload.manifest").Manifest
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
