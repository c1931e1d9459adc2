"""Timelines: what is recorded is what happened, its parts add up, and the pictures hold it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rdmaload
from rdmaload.cli import main
from rdmaload.errors import IntegrityError, NotSupportedError
from rdmaload.stats import LoadStats
from rdmaload.timeline import ReadEvent, Timeline
from rdmaload.timeline_still import lane_layers, shares_of
from tests.support.checkpoints import Checkpoint, make_checkpoint


def event(
    thread: int, taken: float, first: float | None, done: float, *, received: float | None = None, ok: bool = True
) -> ReadEvent:
    return ReadEvent(0.0, taken, first, received, done, 0.001, thread, "m.safetensors", 0, 1000, 1, ok)


def timeline_of(*events: ReadEvent, url: str = "redis://h/m") -> Timeline:
    timeline = Timeline(url, 0.0)
    timeline.events.extend(events)
    return timeline


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return make_checkpoint(tmp_path / "m", {f"t{i:02}": ("U8", [40_000]) for i in range(20)}, files=2)


@pytest.mark.parametrize("store", ["redis", "directory"])
def test_every_read_is_recorded_once_with_times_in_order(store: str, checkpoint: Checkpoint, redis_url: str) -> None:
    url = redis_url if store == "redis" else str(checkpoint.directory)
    if store == "redis":
        rdmaload.save(checkpoint.directory, url, chunk_bytes=50_000)
    stats = LoadStats()
    with rdmaload.open(url, connections=2) as model:
        timeline = model.record()
        model.load(stats=stats)
    assert timeline.url == model.url
    assert timeline.path == stats.path
    assert sum(one.bytes for one in timeline.events) == stats.read_bytes
    assert {one.file for one in timeline.events} == {path.name for path in checkpoint.weight_files}
    places = [(one.file, one.offset) for one in timeline.events]
    if store == "directory":
        assert len(set(places)) == len(places)
    for one in timeline.events:
        assert one.ok
        assert one.attempt == 1
        assert one.taken is not None
        assert one.first_byte is not None
        assert 0 <= one.submitted <= one.taken <= one.first_byte <= one.done
        assert one.received is None
    assert timeline.lane_name == ("connection" if store == "redis" else "reader")
    assert sum(lane.bytes for lane in timeline.lanes()) == stats.read_bytes


def test_nothing_is_recorded_unasked_and_streams_are_recorded_too(checkpoint: Checkpoint) -> None:
    with rdmaload.open(checkpoint.directory) as model:
        model.load()
        timeline = model.record()
        assert timeline.events == []
        assert timeline.summary() == ["nothing was read"]
        for _ in model.weight_iterator(window_bytes=100_000):
            pass
    assert sum(one.bytes for one in timeline.events) == checkpoint.bytes


def test_failed_attempts_are_recorded(checkpoint: Checkpoint, redis_url: str, model: str) -> None:
    import redis

    rdmaload.save(checkpoint.directory, redis_url, chunk_bytes=50_000)
    client = redis.Redis.from_url(redis_url.rsplit("/", 1)[0])
    with rdmaload.open(redis_url, max_integrity_attempts=2) as opened:
        key = next(key for key in client.scan_iter(f"{model}/chunks/*/0/3"))
        client.setrange(key, 100, b"\xff\x00\xff\x00")
        timeline = opened.record()
        with pytest.raises(IntegrityError):
            opened.load()
    client.close()
    failed = [
        one for one in timeline.events if not one.ok and one.offset == 0 and one.file.endswith("1-of-00002.safetensors")
    ]
    assert [one.attempt for one in failed if one.attempt > 1] == [2]
    assert "failed" in timeline.summary()[-1]


def test_the_parts_of_a_lane() -> None:
    timeline = timeline_of(
        event(1, 0.0, 0.1, 0.3),
        event(1, 0.05, 0.3, 0.4),  # asked for while the one before arrives
        event(1, 0.6, 0.7, 0.8),
        event(2, 0.0, None, 1.0, ok=False),
    )
    first, second = timeline.lanes()
    assert first.receiving == pytest.approx(0.4)
    assert first.waiting == pytest.approx(0.2)
    assert first.idle == pytest.approx(0.4)
    assert first.checksum == pytest.approx(0.003)
    assert (first.reads, first.bytes) == (3, 3000)
    assert (second.receiving, second.waiting, second.idle, second.bytes) == (0, 1.0, 0, 0)
    timeline.path = "resp-tcp"
    assert timeline.summary()[1:] == [
        "of their time: 20 % receiving, or waiting for more of a reply (0 % on checksums), 60 % waiting for a first "
        "byte (the store, or this thread's other replies), 20 % with nothing to do",
        "1 attempt failed",
    ]


@pytest.mark.parametrize(("path", "said"), [("file-direct", "the disk's time"), ("python", "the store's time")])
def test_a_reader_does_not_claim_to_know_what_it_waits_for(path: str, said: str, tmp_path: Path) -> None:
    timeline = timeline_of(event(1, 0.0, 0.0, 0.4), event(1, 0.5, 0.5, 1.0))
    timeline.path = path
    shares = timeline.summary()[1]
    assert f"90 % reading, {said} included (0 % on checksums)" in shares
    assert "waiting" not in shares
    timeline.write(tmp_path / "t.html")
    assert data_of((tmp_path / "t.html").read_text())["words"] == timeline.words._asdict()


_TIMES = st.tuples(st.integers(1, 3), st.lists(st.floats(0, 10), min_size=3, max_size=3).map(sorted))


@given(st.lists(_TIMES, min_size=1, max_size=30))
def test_the_parts_add_up_to_the_whole(times: list[tuple[int, list[float]]]) -> None:
    timeline = timeline_of(*(event(thread, taken, first, done) for thread, (taken, first, done) in times))
    begin, end = timeline.span
    for lane in timeline.lanes():
        assert lane.receiving + lane.waiting + lane.idle == pytest.approx(end - begin)
        assert lane.checksum <= lane.receiving
        assert min(lane.receiving, lane.waiting, lane.idle) >= 0


def test_copies_to_a_gpu_have_a_share() -> None:
    timeline = timeline_of(event(1, 0.0, 0.1, 0.5, received=0.25), event(1, 0.3, 0.4, 1.0, received=0.75))
    assert timeline.summary()[-1] == "copies to the GPU were under way for 50 % of the time"
    assert timeline.lanes()[0].receiving == pytest.approx(0.15 + 0.35)


def test_amounts_have_the_units_of_every_other_output() -> None:
    one = event(1, 0.0, 0.0001, 0.0005)._replace(bytes=350_000)
    assert timeline_of(one).summary()[0] == "1 read, 350.0 kB in 0.5 ms (700.0 MB/s), 1 reader"


def data_of(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, object] = json.loads(found[1])
    return data


def test_a_page_holds_everything_and_needs_nothing_else(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    timeline = timeline_of(
        event(1, 0.1, 0.2, 0.3)._replace(file=hostile), event(2, 0.1, 0.2, 0.4, received=0.3), url=f"file:///{hostile}"
    )
    timeline.write(tmp_path / "t.html")
    page = (tmp_path / "t.html").read_text()
    data = data_of(page)
    assert data["files"] == [hostile, "m.safetensors"]
    assert data["rows"] == [
        [0, 0, 100_000, 200_000, 300_000, -1, 1000, 0, 0, 1000, 1, 1],
        [1, 0, 100_000, 200_000, 300_000, 400_000, 1000, 1, 0, 1000, 1, 1],
    ]
    assert (data["lanes"], data["end"]) == (2, 400_000)
    assert "<img" not in page
    timeline_of(event(1, 0.1, 0.2, 0.3)).write(tmp_path / "plain.html")
    assert not re.search(r"(src|href)\s*=|https?://|@import", (tmp_path / "plain.html").read_text())


def test_json_has_the_fields_in_their_order(tmp_path: Path) -> None:
    timeline = timeline_of(event(1, 0.1, 0.2, 0.3))
    timeline.write(tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["fields"] == list(ReadEvent._fields)
    assert document["events"] == [list(timeline.events[0])]


def test_a_png_has_the_lanes_and_the_legend_of_the_page(tmp_path: Path) -> None:
    # By itself: matplotlib keeps its fonts open for as long as the process lives.
    code = """
import sys
from matplotlib.figure import Figure
from tests.python.test_timeline import event, timeline_of

texts = []
def note(figure, path, real=Figure.savefig, **options):
    real(figure, path, **options)
    texts.extend(label.get_text() for label in figure.axes[1].get_yticklabels())
    texts.extend(label.get_text() for legend in figure.legends for label in legend.get_texts())
Figure.savefig = note
events = event(1, 0.1, 0.2, 0.3), event(2, 0.1, 0.2, 0.4, received=0.3), event(1, 0.3, None, 0.4, ok=False)
timeline = timeline_of(*events)
timeline.path = "resp-tcp"
timeline.write(sys.argv[1])
print("\\n".join(texts))
"""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, tmp_path / "t.png"]
    shown = subprocess.run(command, check=True, cwd=root, capture_output=True, text=True).stdout.splitlines()
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert shown[:4] == ["connection 1", "connection 2", "checksums", "to the GPU"]
    words = (text.split(",")[0] for text in shown[4:])
    assert [word.split(" (")[0] for word in words] == [
        "receiving",
        "checksum",
        "waiting for a first byte",
        "nothing asked for: waits for the loader",
        "copy to the GPU",
        "failed attempt",
    ]


_SPANS = st.tuples(st.floats(0, 10), st.floats(0, 10)).map(lambda span: (min(span), max(span)))


@given(st.lists(_SPANS, max_size=20))
def test_shares_of_pixels_are_what_the_spans_take_of_each(spans: list[tuple[float, float]]) -> None:
    def taken_of(first: float, last: float) -> float:
        return sum(max(0.0, min(last, b) - max(first, a)) for a, b in spans)

    expected = [taken_of(2 + number, 3 + number) for number in range(5)]
    assert list(shares_of(spans, 2.0, 5.0, 5)) == pytest.approx(expected, abs=1e-9)


def test_reads_that_share_a_pixel_have_its_shares() -> None:
    # In each tenth of a second 0.03 waiting, 0.05 receiving (0.001 of it the checksum), 0.02 nothing.
    events = [event(1, n / 10, n / 10 + 0.03, n / 10 + 0.08) for n in range(10)]
    layers = lane_layers(events, lambda spans: shares_of(spans, 0.0, 1.0, 2))
    assert [list(heights) for _, heights in layers] == [
        pytest.approx([0.01, 0.01]),
        pytest.approx([0.49, 0.49]),
        pytest.approx([0.3, 0.3]),
    ]


def test_what_cannot_be_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = timeline_of(event(1, 0.1, 0.2, 0.3))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NotSupportedError, match="pip install matplotlib"):
        timeline.write(tmp_path / "u.png")
    with pytest.raises(NotSupportedError, match=r"\.html, \.png or \.json"):
        timeline.write(tmp_path / "t.svg")


def test_the_command_line_writes_one(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "t.html"
    assert main(["load", str(checkpoint.directory), "--timeline", str(target)]) == 0
    shown = capsys.readouterr().out
    assert f"timeline   {target}" in shown
    assert "the disk's time included" in shown
    assert data_of(target.read_text())["lane"] == "reader"
    capsys.readouterr()
    for wrong in ("t.gif", "none/t.html"):
        assert main(["load", str(checkpoint.directory), "--timeline", str(tmp_path / wrong)]) == 2
        out, err = capsys.readouterr()
        assert out == ""  # refused before the work
        assert wrong in err
