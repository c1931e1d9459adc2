"""Numbers for people: bytes, counts, durations and rates, in the same units wherever they are shown."""

from __future__ import annotations

__all__ = ["amount_text", "count_text", "seconds_text", "size_text"]

_UNITS = ("kB", "MB", "GB", "TB", "PB")


def size_text(nbytes: float) -> str:
    """Bytes in decimal units, with one digit after the point.

    >>> size_text(999), size_text(1234567890)
    ('999 bytes', '1.2 GB')
    """
    if nbytes < 1000:
        return count_text(int(nbytes), "byte")
    power = 1
    while nbytes / 1000**power >= 999.95 and power < len(_UNITS):  # would round to 1000.0
        power += 1
    return f"{nbytes / 1000**power:.1f} {_UNITS[power - 1]}"


def count_text(count: int, noun: str) -> str:
    """A count with its noun: "1 file", "20,000 tensors"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def seconds_text(seconds: float) -> str:
    """A duration with the unit that fits: "12.3 ms", "4.56 s"."""
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def amount_text(nbytes: int, seconds: float) -> str:
    """What was moved and how fast: "1.2 GB in 0.60 s (2.0 GB/s)"."""
    rate = f" ({size_text(nbytes / seconds)}/s)" if nbytes and seconds > 0 else ""
    return f"{size_text(nbytes)} in {seconds_text(seconds)}{rate}"
