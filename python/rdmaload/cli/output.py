"""What commands print: lines for people, and JSON.

Names come from stores that others write to: control characters in them never reach a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from rdmaload.cli.exits import describe, exit_code
from rdmaload.errors import RdmaloadError

__all__ = [
    "columns",
    "printable",
    "write_error",
    "write_json",
    "write_lines",
    "write_picture",
    "write_result",
]


def printable(text: str) -> str:
    r"""`text` on one line, with everything that a terminal might obey written as an escape.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def columns(rows: Iterable[Sequence[str]], *, right: int = 0) -> list[str]:
    """Rows as lines, columns two spaces apart, the first `right` of them aligned to the right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number < right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def write_lines(lines: Iterable[str], stream: TextIO | None = None) -> None:
    """Print lines to stdout, or `stream`, whatever its encoding."""
    stream = sys.stdout if stream is None else stream
    encoding = stream.encoding or "utf-8"
    for line in lines:
        text = printable(line).encode(encoding, "backslashreplace").decode(encoding)
        stream.write(text + "\n")


def write_json(document: Mapping[str, object]) -> None:
    """Print one JSON document, in ASCII."""
    sys.stdout.write(_json_text(document))


def _json_text(document: Mapping[str, object]) -> str:
    return json.dumps(document, indent=2) + "\n"


def write_result(as_json: bool | str, document: Mapping[str, object], lines: Iterable[str]) -> None:
    """Print a result as the document or as lines for people; with a file's name, the document goes into that file."""
    if as_json is True:
        write_json(document)
        return
    write_lines(lines)
    if as_json:
        Path(as_json).write_text(_json_text(document), encoding="ascii")


def write_picture(draw: Callable[[], None]) -> int:
    """Draw what is printed already, and say whether that failed; the exit code of the command."""
    try:
        draw()
    except (OSError, RdmaloadError) as err:  # shown here: on stdout the one document is complete
        write_error(f"{describe(err)}: the picture is not complete, the results above are")
        return exit_code(err)
    return 0


def write_error(message: str) -> None:
    """Print one line to stderr."""
    write_lines([f"rdmaload: {message}"], sys.stderr)
