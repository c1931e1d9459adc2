"""A timeline as a picture that stands still: the lanes of the page, each a column of shares per pixel of time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdmaload.errors import NotSupportedError
from rdmaload.timeline import ReadEvent, Timeline, arrival, last_byte, merged, taken

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Shares = NDArray[np.float64]

__all__ = ["draw"]

_PIXELS = 1300  # across the lanes, about
_LANE = 0.7  # of a row
_IDLE = "nothing asked for: waits for the loader, room in flight, or a GPU's buffers"
_RECEIVE, _CHECK, _WAIT, _COPY, _BAD = "#3b6fb6", "#e0a030", "#c4c8cf", "#4b9b5f", "#c0392b"  # as in timeline.html


def draw(timeline: Timeline, path: Path) -> None:
    """Write the picture as PNG. Raises NotSupportedError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as err:
        raise NotSupportedError(f"{path}: pictures as .png need matplotlib: pip install matplotlib") from err
    words, lanes, copies = timeline.words, timeline.lanes(), timeline.copies()
    begin, end = timeline.span
    seconds = max(end - begin, 1e-6)
    checked = any(event.checksum_seconds for event in timeline.events)
    below = ["checksums"] * checked + ["to the GPU"] * bool(copies)
    names = [f"{timeline.lane_name} {number + 1}" for number in range(len(lanes))] + below

    figure = Figure(figsize=(14, 3.6 + 0.45 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    above, rows = figure.subplots(2, 1, sharex=True, height_ratios=[2, max(1, 0.45 * len(names))])
    above.set_title("\n".join([timeline.url, *timeline.summary()]), loc="left", fontsize=9)
    _line(above, timeline, begin)

    def shares(spans: Iterable[tuple[float, float]]) -> Shares:
        return shares_of(spans, begin, seconds, _PIXELS)

    for row, lane in enumerate(lanes):
        events = [event for event in timeline.events if event.thread == lane.thread]
        _lane(rows, row, seconds, lane_layers(events, shares))
        failed = [(taken(event) - begin, last_byte(event) - taken(event)) for event in events if not event.ok]
        rows.broken_barh(failed, (row - _LANE / 2, _LANE), facecolors=_BAD)
    for row, name in enumerate(below, start=len(lanes)):
        if name == "checksums":
            _lane(rows, row, seconds, [(_CHECK, shares(map(_checksum, timeline.events)) / max(1, len(lanes)))])
        else:
            _lane(rows, row, seconds, [(_COPY, shares(copies))])

    rows.set_yticks(range(len(names)), names)
    rows.set_ylim(max(1, len(names)) - 0.5, -0.5)
    rows.set_xlim(0, seconds)
    rows.set_xlabel("seconds; where a pixel holds several things, heights are shares of its time")
    legend = {words.receiving: _RECEIVE, "checksum": _CHECK * checked, words.waiting: _WAIT * bool(words.waiting)}
    legend |= {_IDLE: "white", "copy to the GPU": _COPY * bool(copies)}
    legend["failed attempt"] = _BAD * any(not event.ok for event in timeline.events)
    patches = [Patch(facecolor=color, edgecolor="#667", label=text) for text, color in legend.items() if color]
    figure.legend(handles=patches, loc="outside lower left", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def lane_layers(events: Iterable[ReadEvent], shares: Any) -> list[tuple[str, Shares]]:
    """Colours and heights of one connection's or thread's columns, from below."""
    import numpy as np

    done = [event for event in events if event.ok]
    receiving = shares(merged((arrival(event), last_byte(event)) for event in done))
    asked = shares(merged((taken(event), last_byte(event)) for event in done))
    checksum = np.minimum(receiving, shares(map(_checksum, done)))
    return [(_CHECK, checksum), (_RECEIVE, receiving - checksum), (_WAIT, np.maximum(0, asked - receiving))]


def shares_of(spans: Iterable[tuple[float, float]], begin: float, seconds: float, count: int) -> Shares:
    """Of each of `count` equal parts of the time: how much of it the spans take; more than 1 where they overlap."""
    import numpy as np

    edges = begin + seconds * np.arange(count + 1) / count
    taken_until = np.zeros(count + 1)
    pairs = np.array(list(spans), dtype=np.float64).reshape(-1, 2)
    for times, sign in ((np.sort(pairs[:, 0]), 1), (np.sort(pairs[:, 1]), -1)):
        # What began (or ended) before an edge has taken the time since then (or no longer takes it).
        number = np.searchsorted(times, edges)
        sums = np.concatenate([[0.0], np.cumsum(times - begin)])
        taken_until += sign * (number * (edges - begin) - sums[number])
    return np.clip(np.diff(taken_until) * count / seconds, 0, None)


def _checksum(event: ReadEvent) -> tuple[float, float]:
    """It is known how long it took, not when: drawn at the end."""
    return last_byte(event) - event.checksum_seconds, last_byte(event)


def _lane(axes: Any, row: int, seconds: float, layers: list[tuple[str, Shares]]) -> None:
    import numpy as np

    edges = np.linspace(0, seconds, _PIXELS + 1)
    base = np.full(_PIXELS, row + _LANE / 2)
    for color, heights in layers:
        top = np.maximum(base - _LANE * heights, row - _LANE / 2)
        axes.stairs(top, edges, baseline=base, fill=True, color=color, linewidth=0, antialiased=False)
        base = top


def _line(axes: Any, timeline: Timeline, begin: float) -> None:
    """Bytes over time."""
    total = 0
    times, amounts = [0.0], [0.0]
    for event in sorted(timeline.events, key=lambda event: event.done):
        if event.ok:
            total += event.bytes
            times.append(event.done - begin)
            amounts.append(total / 1e9)
    axes.plot(times, amounts, color=_RECEIVE)
    axes.set_ylabel("GB")
