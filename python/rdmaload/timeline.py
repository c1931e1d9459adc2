"""What happened when while a model was read: every attempt of every read, and pictures of it.

    with rdmaload.open(url) as model:
        timeline = model.record()
        model.load()
    timeline.write("load.html")

A picture has a lane per connection (or thread that reads files) with what it waited for, received and checksummed, the
copies to a GPU below, and the bytes over time above.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rdmaload.amounts import amount_text, count_text
from rdmaload.errors import NotSupportedError

if TYPE_CHECKING:
    from rdmaload import _core

__all__ = ["Lane", "ReadEvent", "Timeline"]

_MICROSECONDS = 1e6


class ReadEvent(NamedTuple):
    """One attempt of one read; times in seconds since the recording began, None where the transport does not say."""

    submitted: float
    """When the loader wanted it."""
    taken: float | None
    """When a connection or thread took it on: it is asked for."""
    first_byte: float | None
    received: float | None
    """When all of it was in host memory, on its way to a GPU."""
    done: float
    checksum_seconds: float
    thread: int
    file: str
    offset: int
    bytes: int
    attempt: int
    ok: bool


@dataclass(frozen=True)
class Lane:
    """What one connection or thread did, in seconds; the parts do not overlap and add up to the whole time."""

    thread: int
    reads: int
    bytes: int
    receiving: float
    """Between the first byte and the last of a read: bytes were arriving and being checksummed, or awaited. Of a reader
    the whole of a read, the disk's or store's time included."""
    checksum: float
    """The part of `receiving` that was spent on checksums."""
    waiting: float
    """It had asked for something of which there was no byte yet: for the store, or while it was busy with other
    replies. Of a reader nothing: it does not know when the first byte came."""
    idle: float
    """It had nothing to do: for the loader, for room in flight, or for a GPU's buffers."""


class Words(NamedTuple):
    """What the parts of a lane are called, by what is known of them: no more is claimed than was measured."""

    receiving: str
    waiting: str


_CONNECTION = Words(
    "receiving, or waiting for more of a reply", "waiting for a first byte (the store, or this thread's other replies)"
)
_FILES = Words("reading, the disk's time included", "")
_PYTHON = Words("reading, the store's time included", "")


class Timeline:
    """The events of one or more loads of one model, in the order in which they ended. Made by `Model.record`."""

    def __init__(self, url: str, begin: float) -> None:
        self.url = url
        self.path = ""
        self.events: list[ReadEvent] = []
        self._begin = begin

    def add(self, trace: Iterable[_core._ReadTrace], files: Sequence[str]) -> None:
        """Add what a native load says of its reads; times there are those of `time.perf_counter`."""
        for submitted, taken, first_byte, received, done, checksum, thread, file, offset, size, attempt, ok in trace:
            self.events.append(
                ReadEvent(
                    submitted - self._begin,
                    self._since(taken),
                    self._since(first_byte),
                    self._since(received),
                    done - self._begin,
                    checksum,
                    thread,
                    files[file],
                    offset,
                    size,
                    attempt,
                    ok,
                )
            )

    def _since(self, when: float | None) -> float | None:
        return None if when is None else when - self._begin

    @property
    def span(self) -> tuple[float, float]:
        """From the first read that was wanted to the last that was done, in seconds since the recording began."""
        if not self.events:
            return 0.0, 0.0
        return min(event.submitted for event in self.events), max(event.done for event in self.events)

    def lanes(self) -> list[Lane]:
        """What each thread did between the two ends of `span`."""
        begin, end = self.span
        by_thread: dict[int, list[ReadEvent]] = {}
        for event in self.events:
            if event.thread:
                by_thread.setdefault(event.thread, []).append(event)
        lanes = []
        for thread, events in sorted(by_thread.items()):
            arriving = merged((arrival(event), last_byte(event)) for event in events)
            busy = merged((taken(event), last_byte(event)) for event in events)
            receiving, asked = _length(arriving), _length(busy)
            lanes.append(
                Lane(
                    thread=thread,
                    reads=len(events),
                    bytes=sum(event.bytes for event in events if event.ok),
                    receiving=receiving,
                    checksum=min(receiving, sum(event.checksum_seconds for event in events)),
                    waiting=max(0.0, asked - receiving),
                    idle=max(0.0, end - begin - asked),
                )
            )
        return lanes

    def summary(self) -> list[str]:
        """Where the time went, in a few lines."""
        begin, end = self.span
        seconds = end - begin
        lanes = self.lanes()
        if seconds <= 0 or not lanes:
            return ["nothing was read"]
        done = sum(event.bytes for event in self.events if event.ok)
        failed = sum(not event.ok for event in self.events)
        whole = seconds * len(lanes)

        def share(name: str) -> str:
            return f"{100 * sum(getattr(lane, name) for lane in lanes) / whole:.0f} %"

        words = self.words
        parts = [f"{share('receiving')} {words.receiving} ({share('checksum')} on checksums)"]
        if words.waiting:
            parts.append(f"{share('waiting')} {words.waiting}")
        parts.append(f"{share('idle')} with nothing to do")
        lines = [
            f"{count_text(len(self.events), 'read')}, {amount_text(done, seconds)}, "
            f"{count_text(len(lanes), self.lane_name)}",
            f"of their time: {', '.join(parts)}",
        ]
        copies = self.copies()
        if copies:
            lines.append(f"copies to the GPU were under way for {100 * _length(copies) / seconds:.0f} % of the time")
        if failed:
            lines.append(f"{count_text(failed, 'attempt')} failed")
        return lines

    def copies(self) -> list[tuple[float, float]]:
        """When copies to a GPU were under way."""
        return merged((event.received, event.done) for event in self.events if event.received is not None)

    @property
    def lane_name(self) -> str:
        """What the threads are: "connection" or "reader"."""
        return "connection" if self.path.startswith(("resp", "http")) else "reader"

    @property
    def words(self) -> Words:
        """What the parts of a lane are called."""
        if self.lane_name == "connection":
            return _CONNECTION
        return _PYTHON if self.path.startswith("python") else _FILES

    def to_json(self) -> dict[str, object]:
        """Everything, ready for `json.dumps`: times in seconds, the fields of `ReadEvent` in their order."""
        return {
            "url": self.url,
            "path": self.path,
            "summary": self.summary(),
            "fields": list(ReadEvent._fields),
            "events": [list(event) for event in self.events],
        }

    def write(self, path: str | Path) -> None:
        """Write a picture: `.html` (one file that needs nothing else), `.png` (needs matplotlib), or `.json`.

        Raises NotSupportedError for another kind of file, and where matplotlib is missing.
        """
        path = Path(path)
        kind = path.suffix.lower()
        if kind in (".html", ".htm"):
            path.write_text(self._page(), encoding="utf-8")
        elif kind == ".json":
            path.write_text(json.dumps(self.to_json()), encoding="utf-8")
        elif kind == ".png":
            from rdmaload.timeline_still import draw

            draw(self, path)
        else:
            raise NotSupportedError(f"{path}: a timeline is written as .html, .png or .json")

    def _page(self) -> str:
        begin, end = self.span
        threads = {lane.thread: number for number, lane in enumerate(self.lanes())}
        files = sorted({event.file for event in self.events})
        file_number = {file: number for number, file in enumerate(files)}

        def micro(when: float | None) -> int:
            return -1 if when is None else round((when - begin) * _MICROSECONDS)

        rows = [
            [
                threads[event.thread],
                micro(event.submitted),
                micro(event.taken),
                micro(arrival(event)),
                micro(last_byte(event)),
                micro(event.done) if event.received is not None else -1,
                round(event.checksum_seconds * _MICROSECONDS),
                file_number[event.file],
                event.offset,
                event.bytes,
                event.attempt,
                int(event.ok),
            ]
            for event in sorted(self.events, key=arrival)
            if event.thread in threads
        ]
        data = {
            "title": f"{self.url}",
            "summary": self.summary(),
            "lane": self.lane_name,
            "words": self.words._asdict(),
            "lanes": len(threads),
            "end": round((end - begin) * _MICROSECONDS),
            "files": files,
            "rows": rows,
        }
        page = resources.files("rdmaload").joinpath("timeline.html").read_text(encoding="utf-8")
        # Text of the model (a file's name) must not be able to end the script element.
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        return page.replace("{{TITLE}}", html.escape(self.url)).replace("{{DATA}}", text)


def taken(event: ReadEvent) -> float:
    return event.submitted if event.taken is None else event.taken


def arrival(event: ReadEvent) -> float:
    """When the first byte came; of a read of which none did, when it ended."""
    return last_byte(event) if event.first_byte is None else event.first_byte


def last_byte(event: ReadEvent) -> float:
    return event.done if event.received is None else event.received


def merged(spans: Iterable[tuple[float | None, float]]) -> list[tuple[float, float]]:
    """The union of intervals, as disjoint ones in order."""
    merged: list[tuple[float, float]] = []
    for first, last in sorted((first, last) for first, last in spans if first is not None):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return merged


def _length(spans: Iterable[tuple[float, float]]) -> float:
    return sum(last - first for first, last in spans)
