"""The harness of benchmarks/compare: whom it believes, in which order it runs, and what it says of those that fail."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from benchmarks import checkpoints, machine, paired
from benchmarks.compare import __main__ as compare
from benchmarks.compare import environments, harness, report, worker
from benchmarks.compare.adaptors import ADAPTORS, Place

BYTES = 40 << 20  # far above what a process touches besides

# A worker like the real one, with contenders of its own; each of them loads in a way that its name says.
WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks import checkpoints
from benchmarks.compare import adaptors, worker

if sys.argv[1] not in ("dies", "raises", "slow", "gone"):  # which need no tensors
    import torch
    from safetensors.torch import load_file, save_file

def owned(place):
    with open({log!r}, "a") as log:
        log.write(sys.argv[1] + "\\n")
    return {{name: tensor.clone() for name, tensor in load_file(checkpoints.weight_files(place.directory)[0]).items()}}

def wrong(place):
    state = owned(place)
    state["b"].view(torch.uint8)[-1] ^= 1
    return state

def among_readers(place):  # how many were before
    for number in range(100):
        try:
            open(f"{{place.directory}}/reader {{number}}", "x").close()
            return number
        except FileExistsError:
            pass

def one_wrong(place):
    return wrong(place) if among_readers(place) == 1 else owned(place)

def in_turn(place):
    import time
    time.sleep(0.3 * among_readers(place))
    return owned(place)

def save_as(change):
    def save(place, state):
        state = dict(state)
        change(state)
        save_file(state, f"{{place.target}}/saved")
    return save

def flip(state):
    state["c"] = state["c"].clone()
    state["c"].view(torch.uint8)[5] ^= 16

def saved(place):
    return load_file(f"{{place.target}}/saved")

def imports(place):
    with open({log!r}, "a") as log:
        log.write("wave: before\\n" if "wave" in sys.modules else "wave: now\\n")
    import wave
    return owned(place)

def mapped(place):
    return load_file(checkpoints.weight_files(place.directory)[0])

def dies(place):
    import os
    os._exit(7)

def raises(place):
    raise OSError("no such store")

def slow(place):
    import os, time
    with open({log!r}, "a") as log:
        log.write(f"{{os.getpid()}}\\n")
    time.sleep(60)

def fewer(place):
    state = owned(place)
    del state["a"]
    return state

compare = checkpoints.compare
def compare_and_note(state, directory):
    with open({log!r}, "a") as log:
        log.write("compared\\n")
    return compare(state, directory)
checkpoints.compare = compare_and_note

ways = dict(ours=owned, theirs=owned, wrong=wrong, mapped=mapped, dies=dies, raises=raises, slow=slow, fewer=fewer)
ways.update({{"one wrong": one_wrong, "in turn": in_turn, "imports": imports}})
adaptors.ADAPTORS.update({{name: adaptors.Adaptor((), way) for name, way in ways.items()}})
savers = {{"saves": len, "saves less": lambda state: state.pop("a"), "saves wrong": flip}}
for name, change in savers.items():
    adaptors.ADAPTORS[name] = adaptors.Adaptor((), save=save_as(change), saved=saved)
if sys.argv[1] == "gone":
    sys.exit("cannot import name gone")
worker.main()
"""


@pytest.fixture
def contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes one of the contenders above."""
    (tmp_path / "fake_worker.py").write_text(
        textwrap.dedent(WORKER).format(root=str(environments.ROOT), log=str(tmp_path / "log"))
    )
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(paired, "back_memory", lambda nbytes: None)
    checkpoints.make_checkpoint(
        tmp_path / "plain", {"a": ("BF16", (BYTES // 4,)), "b": ("BF16", (BYTES // 4 // 64, 64)), "c": ("F32", (3,))}
    )
    place = Place(str(tmp_path / "plain"), target=str(tmp_path))
    return lambda name: harness.Contender(name, Path(sys.executable), place, module="fake_worker")


TASK = harness.Task("task", BYTES)


def test_pairs_run_in_turns_and_the_first_changes(contender: Any, tmp_path: Path) -> None:
    kept: list[str] = []

    def prepare() -> None:  # which empties the page cache for a cold run
        with open(tmp_path / "log", "a") as log:
            log.write("prepared\n")

    task = replace(TASK, prepare=prepare)
    found = harness.compare(
        contender("ours"), [contender("theirs")], task, 3, keep=lambda so_far: kept.append(json.dumps(so_far))
    )
    assert kept == [json.dumps(found)]  # a run that is cut short after it loses nothing
    lines = (tmp_path / "log").read_text().split()
    ran = lines[1::3]
    assert lines[::3] == ["prepared"] * len(ran)  # each run of both
    assert lines[2::3] == ["compared"] * len(ran)
    assert ran[:2] == ["ours", "theirs"]  # each once, before time counts
    assert ran[2:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    result = found["against"]["theirs"]
    assert result["pairs"] == 3
    times = [result[side]["all_seconds"] for side in ("ours", "theirs")]
    ratios = [theirs / ours for ours, theirs in zip(*times, strict=True)]
    assert result["ratios"] == pytest.approx(ratios, rel=0.05)
    assert result["median_ratio"] == pytest.approx(float(numpy.median(ratios)), rel=0.05)
    low, high = result["interval_95"]
    assert low <= result["median_ratio"] <= high


def test_one_that_cannot_be_believed_is_named_and_gets_no_ratio(contender: Any) -> None:
    reasons = {
        "wrong": "WRONG BYTES: b: other bytes than model.safetensors",
        "fewer": "WRONG BYTES: a of model.safetensors was not loaded",
        "mapped": "only maps",
        "dies": "died with exit code 7",
        "raises": "OSError: no such store",
        "gone": "its process ended with 1: cannot import name gone",
    }
    others = [contender(name) for name in [*reasons, "theirs"]]
    found = harness.compare(contender("ours"), others, TASK, 1)["against"]
    for name, reason in reasons.items():
        assert reason in found[name]["failed"]
        assert "median_ratio" not in found[name]
    assert found["theirs"]["pairs"] == 1  # the others are measured all the same


def test_what_was_saved_is_read_back_and_compared(contender: Any) -> None:
    others = [contender(name) for name in ("saves less", "saves wrong")]
    found = harness.compare(contender("saves"), others, TASK, 1)["against"]
    assert "WRONG BYTES: a of model.safetensors was not loaded" in found["saves less"]["failed"]
    assert "WRONG BYTES: c: other bytes than model.safetensors" in found["saves wrong"]["failed"]


@pytest.mark.parametrize("name", [name for name, adaptor in ADAPTORS.items() if "safetensors, save" in name])
def test_what_is_on_the_disk_is_what_counts(name: str, tmp_path: Path) -> None:
    checkpoints.make_checkpoint(tmp_path / "plain", {"a": ("BF16", (100, 10)), "b": ("F32", (3,))})
    place, adaptor = Place(str(tmp_path / "plain"), target=str(tmp_path / "saved")), ADAPTORS[name]
    assert worker.measured(adaptor, place, None)["wrong"] is None
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["model.safetensors"]

    def bad(place: Place, state: Mapping[str, Any]) -> Mapping[str, Any]:
        assert adaptor.save is not None
        adaptor.save(place, state)
        with open(tmp_path / "saved" / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        return {}

    assert "other bytes" in worker.measured(replace(adaptor, save=bad), place, None)["wrong"]


def test_one_contender_saves_with_the_promise_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.make_checkpoint(tmp_path / "plain", {"a": ("BF16", (100,))})
    synced: list[tuple[str, bool]] = []
    target = tmp_path / "saved"
    fsync = os.fsync

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((str(path.relative_to(tmp_path)), (target / "model.safetensors").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    ADAPTORS["safetensors, save_file and fsync"].ready(Place(str(tmp_path / "plain"), target=str(target)))()
    assert synced == [("saved/.model.safetensors", False), ("saved", True)]


def test_no_claim_is_made_when_ours_is_wrong(contender: Any) -> None:
    with pytest.raises(harness.Failed, match="wrong: WRONG BYTES"):
        harness.compare(contender("wrong"), [contender("theirs")], TASK, 1)


@pytest.mark.parametrize("readers", [1, 2])
def test_what_the_first_run_imported_is_there_when_time_counts(readers: int, contender: Any, tmp_path: Path) -> None:
    task = harness.Task("task", readers * BYTES, readers)
    with contextlib.closing(harness.Runner(contender("imports"))) as runner:
        for _ in range(2):
            harness.one(runner, task)
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("wave")]
    assert lines == ["wave: now"] * readers + ["wave: before"] * readers


@pytest.mark.parametrize("readers", [1, 3])
def test_a_run_that_hangs_is_ended_and_leaves_nobody(
    readers: int, contender: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RUN_SECONDS", 1.0)
    with contextlib.closing(harness.Runner(contender("slow"))) as runner:
        with pytest.raises(harness.Failed, match=r"slow: .*took more than 1 seconds"):
            harness.one(runner, harness.Task("task", readers * BYTES, readers))
        ran = (tmp_path / "log").read_text().split()
        assert len(ran) == readers
        deadline = time.monotonic() + 10
        while any(Path("/proc", pid).exists() for pid in ran):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_several_readers_begin_together_and_one_that_dies_is_noticed(contender: Any, tmp_path: Path) -> None:
    task = harness.Task("task", 3 * BYTES, readers=3)
    others = [contender("theirs"), contender("dies")]
    found = harness.compare(contender("ours"), others, task, 50, seconds=0)["against"]
    assert (tmp_path / "log").read_text().count("theirs") == 6
    assert found["theirs"]["theirs"]["peak_bytes"] > 3 * BYTES
    assert found["theirs"]["pairs"] == 1  # the time was over: the result says how many there were
    assert "3 of 3 readers died" in found["dies"]["failed"]


def test_every_reader_compares_every_byte_after_the_last_has_loaded(contender: Any, tmp_path: Path) -> None:
    task = harness.Task("task", 3 * BYTES, readers=3)
    with contextlib.closing(harness.Runner(contender("in turn"))) as runner:
        assert harness.one(runner, task)["seconds"] > 0.6
    assert (tmp_path / "log").read_text().splitlines() == ["in turn"] * 3 + ["compared"] * 3
    for marker in (tmp_path / "plain").glob("reader *"):
        marker.unlink()
    with (
        contextlib.closing(harness.Runner(contender("one wrong"))) as runner,
        pytest.raises(harness.Failed, match=r"one wrong: WRONG BYTES: reader [123]: b: other bytes"),
    ):
        harness.one(runner, task)


def test_the_interval_holds_the_median_and_narrows_with_agreement() -> None:
    wide = paired.bootstrap_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    narrow = paired.bootstrap_interval([2.9, 3.0, 3.0, 3.0, 3.1])
    assert wide[0] <= 3.0 <= wide[1]
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_an_environment_that_cannot_be_made_is_missing_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = environments.Environment(("no such package==1",))
    monkeypatch.setitem(environments.ENVIRONMENTS, "broken", broken)
    with pytest.raises(environments.Missing, match="pip install no such package==1 failed"):
        environments.python_of("broken", tmp_path)
    assert not (tmp_path / "broken" / "made-of").exists()


def test_a_cold_run_finds_no_file_in_the_page_cache_and_a_warm_one_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoints.make_checkpoint(tmp_path / "plain", {"a": ("BF16", (4 << 20,))})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # what others read stays cached
    for cache, cached in (("cold", 0), ("warm", 1), ("cold", 0)):
        with compare.scene("file", "tensors", cache, made, tmp_path) as found:
            assert found.prepare is not None
            found.prepare()
        assert machine.cached_fraction(made.directory) in (cached, None)
    monkeypatch.setattr(machine, "cached_fraction", lambda directory: 0.25)
    for cache in ("cold", "warm"):
        with pytest.raises(harness.Failed, match=f"{cache}: 25% of the files are in the page cache"):
            compare.fill_page_cache(tmp_path, cache)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--source", "s3", "--region", "save"], "--source s3 --region save: the store here is nginx"),
        (
            ["--source", "mooncake", "s3", "--region", "save"],
            "--source mooncake --region save: Mooncake Store is a cache",
        ),
        (["--source", "s3", "file", "--against", "tensorizer", "obstor", "LMCache"], "--against LMCache: no contender"),
        (["--source", "redis", "--region", "save", "--against", "hiredis"], "there are SGLang's connector, set"),
        (["--source", "file", "--json", "/none/found.json"], "there is no directory /none"),
    ],
)
def test_a_comparison_of_nothing_is_refused(
    arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    with pytest.raises(SystemExit, match="2"):
        compare.main()
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "no json", "{}", "[]"])
def test_a_report_of_no_result_is_refused(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    if content is not None:
        found.write_text(content)
    monkeypatch.setattr(sys, "argv", ["report", str(found)])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "no result of benchmarks.compare can be read" in capsys.readouterr().err


def test_a_comparison_that_is_ended_leaves_no_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.compare", "--source", "file", "--against", "cloned", "--bytes", "1e6"]
    with subprocess.Popen([*command, "--pairs", "1000", "--dir", str(tmp_path)], cwd=environments.ROOT) as process:
        try:
            while not any(tmp_path.glob("*/plain/*")):
                assert process.poll() is None
                time.sleep(0.05)
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_a_part_with_nothing_to_compare_is_in_the_result_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tmp_path / "found.json"
    command = ["compare", "--source", "s3", "redis", "file", "--region", "save", "--bytes", "1e5", "--against", "set"]
    monkeypatch.setattr(sys, "argv", [*command, "--peers", str(tmp_path), "--json", str(found)])
    monkeypatch.setitem(compare.SAVE, "redis", {"SGLang's connector, set": "none"})
    monkeypatch.setitem(environments.ENVIRONMENTS, "none", environments.Environment(("none==1",)))

    def missing(name: str, directory: Path) -> Path:
        raise environments.Missing(f"no {name} in {directory.name}")

    monkeypatch.setattr(environments, "python_of", missing)
    compare.main()
    text = report.table(report.read([found]))
    assert "| s3, save | everyone | 0 | not run: the store here is nginx" in text
    assert "| file, save | everyone | 0 | not run: --against names none of safetensors, save_file;" in text
    assert f") | SGLang's connector, set | 0 | not run: no none in {tmp_path.name} |" in text


def test_more_to_do_is_compared_by_speed_and_shown_with_what_it_needs(contender: Any, tmp_path: Path) -> None:
    three, alone = harness.Task("three", 3 * BYTES, readers=3), harness.Task("alone", BYTES)
    found = harness.compare_with_itself((contender("ours"), three), (contender("ours"), alone), 2)
    ran = [line for line in (tmp_path / "log").read_text().split() if line == "ours"]
    assert len(ran) == (3 + 1) * (1 + 2)  # each once, before time counts
    ours, compared = found["ours"], found["compared"]
    speeds = zip(ours["all_seconds"], compared["all_seconds"], strict=True)
    assert found["ratios"] == pytest.approx([3 * one / all_three for all_three, one in speeds], rel=0.05)
    assert ours["peak_bytes"] > 2 * compared["peak_bytes"]  # of all three
    result = {"task": "three", "bytes": 3 * BYTES, "against": {}, "missing": {}, "one_reader": found}
    assert "| three (0.126 GB) | ours: one reader alone | 2 | " in report.table([result])


def test_the_time_of_a_server_is_that_of_its_children_too() -> None:
    spin = "import os, time\nos.fork()\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
    command = [sys.executable, "-c", f"{spin}print(flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == server.stdout.readline() == b"\n"  # both are done
            assert worker._server_seconds(server.pid) >= 0.4
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        finally:
            server.kill()
    for child in children:
        os.kill(int(child), signal.SIGKILL)


def test_the_report_names_everyone_and_draws_those_with_a_ratio(tmp_path: Path) -> None:
    def side(factor: float, server: float | None) -> dict[str, Any]:
        of = {name: {"median": value * factor, "q1": 1.5, "q3": 2.5} for name, value in (("speed", 2), ("cpu", 0.5))}
        return {
            "gb_per_s": of["speed"],
            "cpu_s_per_gb": of["cpu"],
            "server_cpu_s_per_gb": None if server is None else {"median": server},
            "peak_bytes": int(factor * 2**30),
            "load_average": of["speed"],
        }

    ours, theirs = side(1, 0.25), side(2, 0.75)
    good = {"pairs": 15, "median_ratio": 0.5, "interval_95": [0.4, 0.7], "ours": ours, "theirs": theirs}
    result = {
        "task": "file, one, warm",
        "source": "file",
        "region": "one",
        "cache": "warm",
        "bytes": 4_000_000_000,
        "against": {
            "quick": good,
            "once": {**good, "pairs": 1, "ratios": [0.5], "ours": side(1, None), "theirs": side(2, None)},
            "liar": {"failed": "liar: WRONG BYTES: a", "pairs": 0},
        },
        "missing": {"absent": "needs a GPU"},
        "few_tensors": {**good, "compared": side(0.5, 0.125)},
    }
    (tmp_path / "found.json").write_text(json.dumps({"results": [result], "not_here": {"one more": "no such thing"}}))
    results = report.read([tmp_path / "found.json"])
    text = report.table(results)
    task = "| file, one, warm (4 GB) |"
    speeds = "2.00 (1.50 to 2.50), 4.00 (1.50 to 2.50)"
    assert text.splitlines()[2:] == [
        f"{task} quick | 15 | 0.50 (0.40 to 0.70) | {speeds} | 0.50, 1.00 | 0.25, 0.75 | 1024, 2048 | 2.0, 4.0 |",
        f"{task} once | 1 | 0.50 (no interval) | {speeds} | 0.50, 1.00 |  | 1024, 2048 | 2.0, 4.0 |",
        f"{task} liar | 0 | WRONG BYTES: a | | | | | |",
        f"{task} absent | 0 | not run: needs a GPU | | | | | |",
        f"{task} ours: the same bytes in 150 tensors | 15 | 0.50 (0.40 to 0.70) | 2.00 (1.50 to 2.50), "
        "1.00 (1.50 to 2.50) | 0.50, 0.25 | 0.25, 0.12 | 1024, 512 | 2.0, 1.0 |",
    ]
    assert len({line.count("|") for line in text.splitlines()}) == 1
    # In a process of its own, because matplotlib never closes its fonts.
    command = [
        sys.executable,
        "-m",
        "benchmarks.compare.report",
        str(tmp_path / "found.json"),
        "--plots",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=environments.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{text}\n\nNot here:\n- one more: no such thing"
    assert "<svg" in (tmp_path / "compare-file.svg").read_text()
