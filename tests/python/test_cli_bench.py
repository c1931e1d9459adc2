"""`rdmaload bench`: its verdict on made-up figures, and its report on real stores."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree

import pytest

import rdmaload
from rdmaload.cli import main
from rdmaload.cli.bench_store import _is_local
from rdmaload.cli.rates import Figure
from rdmaload.cli.verdict import Findings, judge
from rdmaload.connectors.memory import forget_store
from rdmaload.urls import parse_url
from tests.support.checkpoints import Checkpoint
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Stall
from tests.support.s3 import HttpObjects, moto_s3, s3_url
from tests.support.servers import RedisServer

SMALL = ("--bytes", "2MB", "--repeat", "2")


def figure(*gb_per_s: float) -> Figure:
    return Figure("x", tuple(rate * 1e9 for rate in gb_per_s))


# A server on this machine that sends 3 GB/s whatever the connections, and a load that nearly reaches that.
FOUND = Findings(
    kind="server",
    sample_bytes=10**9,
    load=figure(2.8),
    store={1: figure(3.0), 2: figure(3.0), 4: figure(3.1)},
    configured=2,
    fresh=figure(8.0),
    small_pages=figure(2.0),
    touched=figure(15.0),
    cpus=8,
    checksum=figure(20.0),
    stream=figure(6.0),
    round_trip=0.0001,
    bytes_in_flight=4 << 20,
    chunk_bytes=1044480,
    huge_pages="madvise",
    congestion_control="cubic",
)


def judged(**changes: Any) -> tuple[str, str, str]:
    verdict = judge(dataclasses.replace(FOUND, **changes))
    return verdict.limit, verdict.text, "\n".join(verdict.advice)


def test_a_single_thread_that_a_load_keeps_busy() -> None:
    limit, text, advice = judged()
    assert limit == "store"
    assert text == "the store's single thread is the limit: a load ran at 2.8 of 3.0 GB/s"
    assert "connections=" not in advice
    assert "io-threads" in advice


def test_connections_that_help_are_advised_only_when_that_is_no_chance() -> None:
    faster = {1: figure(1.6), 2: figure(2.9, 3.0, 3.1), 4: figure(4.0, 4.1, 4.2)}
    limit, text, advice = judged(store=faster)
    assert (limit, text.split(" is ")[0]) == ("store", "the store")
    assert "set connections=4: the store gave 4.1 GB/s with it, 3.0 with 2" in advice
    assert "io-threads" not in advice
    overlapping = faster | {4: figure(3.05, 4.1, 4.2)}
    assert "connections=" not in judged(store=overlapping)[2]


@pytest.mark.parametrize(
    ("changes", "limit", "words", "advice"),
    [
        ({"stream": figure(3.1)}, "network", "loopback", ""),
        ({"stream": None, "link": 3.1e9}, "network", "3.1 GB/s", ""),
        ({"round_trip": 0.0013, "stream": None}, "distance", "1.30 ms", "set bytes_in_flight=20MiB"),
        ({"fresh": figure(2.9)}, "memory", "fresh memory", "load_into()"),
        ({"checksum": figure(1.45)}, "checksum", "the checksum", "verify=off"),
        ({"load": figure(1.5), "cpus": 2}, "cpu", "share 2 CPUs", "more than 2 CPUs"),
        ({"load": figure(1.5), "cpus": 16}, "cpu", "share 16 CPUs", ""),
        ({"kind": "files", "stream": None, "chunk_bytes": None}, "store", "reading the files", ""),
        ({"kind": "python"}, "store", "Python code", "native_transport()"),
        ({"sample_bytes": 10**6}, "sample", "too little", ""),
        ({"huge_pages": "never"}, "store", "single thread", "echo madvise"),
        ({"congestion_control": "bbr"}, "store", "single thread", "cubic or reno"),
        ({"chunk_bytes": 16 << 20}, "store", "single thread", "default chunk size"),
        ({"load": figure(1.0, 2.8, 2.9)}, "store", "single thread", "raise --repeat"),
    ],
)
def test_what_limits_and_what_to_do(changes: dict[str, Any], limit: str, words: str, advice: str) -> None:
    verdict = judged(**changes)
    assert verdict[0] == limit
    assert words in verdict[1]
    assert advice in verdict[2]


def test_what_a_load_outran_is_not_its_limit() -> None:
    limit, text, _ = judged(fresh=figure(1.0))
    assert limit == "store"
    assert "2.8 of 3.0" in text
    assert "as fast as that alone (2.7)" in judged(fresh=figure(2.7))[1]


def test_a_stage_that_a_load_outran_is_still_its_limit_where_all_others_are_further_away() -> None:
    # As measured with --repeat 1 --connections 1 on two CPUs: fresh memory came slower than in the load.
    once: dict[str, Any] = {"fresh": figure(0.5), "load": figure(0.78), "store": {1: figure(4.1)}, "configured": 1}
    limit, text, advice = judged(**once, cpus=2)
    assert limit == "memory"
    assert text == (
        "finding and clearing fresh memory is the likeliest limit, but the figures are unsteady: a load ran at 0.8 "
        "GB/s, and that alone at 0.5"
    )
    assert "raise --repeat: a load does not run faster" in advice
    assert "CPUs" not in advice
    limit, text, _ = judged(**once | {"fresh": figure(0.1)})  # further from it than the store is
    assert (limit, "the one nearest above that alone at 4.1" in text) == ("cpu", True)
    everything = {"load": figure(9.0), "checksum": None}
    limit, text, advice = judged(**everything)
    assert (limit, "unsteady" in text, "raise --repeat" in advice) == ("memory", False, True)
    limit, text, _ = judged(**everything | {"load": figure(12.0)})
    assert (limit, "the figures are unsteady" in text) == ("memory", True)


def test_one_round_says_so() -> None:
    assert "measured once" in judged()[2]
    assert "--repeat" not in judged(load=figure(2.7, 2.8, 2.9))[2]


def test_advice_is_for_what_is_in_the_way() -> None:
    assert "cubic" not in judged(congestion_control="bbr", stream=None)[2]
    assert "chunk size" not in judged(kind="files", chunk_bytes=None)[2]
    assert "bytes_in_flight" not in judged(round_trip=0.0005)[2]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(out)
    assert isinstance(document, dict)
    return document


def test_a_store_is_measured_and_not_written_to(
    redis_url: str, redis_server: RedisServer, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    rdmaload.save(tiny_checkpoint.directory, redis_url)
    with redis_server.client() as client:
        before = {key: client.dump(key) for key in client.scan_iter("*")}
        document = run_json(capsys, redis_url, *SMALL, "--connections", "1,3")
        assert {key: client.dump(key) for key in client.scan_iter("*")} == before
    measured = {entry["name"]: entry for entry in document["measurements"]}
    assert list(measured) == [
        *("fresh memory", "fresh memory, small pages", "touched memory", "checksum", "stream"),
        *("store, 1", "store, 3", "load"),
    ]
    for entry in measured.values():
        assert entry["samples"] == 2
        assert 0 < entry["min_gb_per_s"] <= entry["gb_per_s"] <= entry["max_gb_per_s"]
    assert measured["store, 1"]["note"] == "as set"
    assert document["limit"] == "sample"  # 2.5 MB say nothing
    assert document["verdict"]
    assert document["round_trip_seconds"] > 0
    assert 0 < document["bytes"] <= 2_000_000
    assert document["load"]["bytes"] == document["bytes"]
    assert document["load"]["verified_bytes"] >= document["bytes"]


def test_options_of_the_url_are_those_of_the_load_and_do_not_stop_the_comparison(
    redis_url: str, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    rdmaload.save(tiny_checkpoint.directory, redis_url)
    document = run_json(capsys, f"{redis_url}?connections=3&verify=off", *SMALL, "--connections", "1")
    names = {entry["name"]: entry["note"] for entry in document["measurements"]}
    assert names["store, 3"] == "as set"
    assert "checksum" not in names  # nothing was verified
    assert document["load"]["connections"] == 3


def test_a_directory_and_a_store_in_python_are_measured_too(
    tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run_json(capsys, str(tiny_checkpoint.directory), *SMALL)
    names = [entry["name"] for entry in document["measurements"]]
    assert "stream" not in names
    assert document["round_trip_seconds"] is None
    assert document["load"]["path"].startswith("file")
    try:
        rdmaload.save(tiny_checkpoint.directory, "memory://bench/m")
        document = run_json(capsys, "memory://bench/m", *SMALL)
        assert document["load"]["path"] == "python"
        assert main(["bench", "memory://bench/m", *SMALL]) == 0
    finally:
        forget_store("bench")
    out = capsys.readouterr().out
    assert "store, 4 threads" in out
    assert "too little to say" in out


def test_a_rank_of_a_sharded_model_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    for rank in range(2):
        state = {f"w{rank}": torch.zeros(1000 * (rank + 1))}
        rdmaload.save(state, tmp_path / "m", rank=rank, world_size=2, save_id="x")
    assert main(["bench", str(tmp_path / "m"), *SMALL]) == 7
    capsys.readouterr()
    assert run_json(capsys, str(tmp_path / "m"), *SMALL, "--rank", "1")["bytes"] == 8000


@pytest.mark.parametrize(
    "arguments",
    [("--repeat", "0"), ("--connections", "0"), ("--connections", "1,"), ("--connections", "2000"), ("--bytes", "x")],
)
def test_arguments_that_make_no_sense(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory://bench/m", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_that_is_not_there(redis_url: str) -> None:
    assert main(["bench", redis_url, *SMALL]) == 3


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("redis://127.0.0.1:1/m", True),
        ("redis://localhost/m", True),
        ("redis://[::1]/m", True),
        ("redis://192.0.2.1/m", False),
        ("redis://no-such-host.invalid/m", False),
        ("memory://store/m", False),
    ],
)
def test_whether_a_store_is_on_this_machine(url: str, local: bool) -> None:
    assert _is_local(parse_url(url)) is local


def test_an_interrupted_measurement_ends_with_130(
    redis_url: str, redis_server: RedisServer, tiny_checkpoint: Checkpoint
) -> None:
    rdmaload.save(tiny_checkpoint.directory, redis_url)
    environment = {**os.environ, "PYTHONPATH": str(Path(rdmaload.__file__).parents[1])}
    with FaultProxy(redis_server.host, redis_server.port, Stall(after=500_000)) as proxy:
        process = subprocess.Popen(
            [sys.executable, "-m", "rdmaload", "bench", proxy.url(redis_url.rpartition("/")[2]), *SMALL],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                assert proxy.wait_for_fault(60)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
    assert (process.returncode, out, err) == (130, "", "rdmaload: interrupted\n")


# Loaders beside ours, devices, pictures


def test_other_loaders_read_the_same_files_or_are_named_with_the_reason(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    against = "safetensors,fastsafetensors,boto3"
    command = ["bench", str(tiny_checkpoint.directory), *SMALL, "--against", against, "--json", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    document = json.loads(out.read_text())
    found = {one["name"]: one for one in document["against"]}
    assert list(found)[:2] == ["rdmaload", "safetensors"]
    assert found["rdmaload"]["ratio"] == 1
    assert found["safetensors"]["samples"] == 2
    assert found["safetensors"]["ratio"] == pytest.approx(
        found["rdmaload"]["gb_per_s"] / found["safetensors"]["gb_per_s"]
    )
    assert found["boto3"]["left_out"] == "does not read file:// (it reads s3)"
    if importlib.util.find_spec("fastsafetensors") is None:
        assert found["fastsafetensors"]["left_out"] == "not installed: pip install fastsafetensors"
        assert "left out" in shown
    assert "times as fast" in shown


def test_redis_py_reads_the_chunks_of_the_same_files(
    tiny_checkpoint: Checkpoint, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rdmaload.cli import peers

    rdmaload.save(tiny_checkpoint.directory, redis_url)
    answers: list[tuple[str, int]] = []
    run = peers._run

    def note(name: str, job: dict[str, Any]) -> dict[str, Any]:
        answer = run(name, job)
        answers.append((name, answer["bytes"]))
        return answer

    monkeypatch.setattr(peers, "_run", note)
    assert main(["bench", redis_url, *SMALL, "--against", "redis-py,safetensors", "--json"]) == 0
    against = json.loads(capsys.readouterr().out)["against"]
    assert [one["name"] for one in against] == ["rdmaload", "redis-py", "safetensors"]
    assert [name for name, _ in answers] == ["rdmaload", "redis-py", "redis-py", "rdmaload"]  # in turns
    read = dict(answers)
    headers = read["redis-py"] - read["rdmaload"]
    assert 0 < headers < 10_000  # whole files: their headers, too


def test_s3_clients_read_the_objects_of_the_same_files(
    tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with moto_s3("bucket") as endpoint:
        url = s3_url(endpoint, "bucket", "models/tiny", addressing_style="path")
        rdmaload.save(tiny_checkpoint.directory, url)
        command = ["bench", url, "--bytes", "2MB", "--repeat", "1", "--against", "boto3,obstore,runai", "--json"]
        assert main(command) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["against"]}
    assert found["boto3"]["samples"] == 1
    assert found["obstore"]["samples"] == 1
    if importlib.util.find_spec("runai_model_streamer") is None:
        packages = "runai-model-streamer runai-model-streamer-s3"
        assert found["runai"]["left_out"] == f"not installed: pip install {packages}"
    else:
        assert found["runai"]["samples"] == 1


@pytest.mark.parametrize("store", ["s3", "redis"])
def test_a_chunk_size_is_advised_for_key_value_stores_alone(
    store: str,
    tiny_checkpoint: Checkpoint,
    redis_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rdmaload.cli import verdict

    monkeypatch.setattr(verdict, "_ENOUGH_SAMPLE_BYTES", 1)
    command = ["--bytes", "2MB", "--repeat", "1"]
    if store == "redis":
        rdmaload.save(tiny_checkpoint.directory, redis_url, chunk_bytes=8 << 20)
        document = run_json(capsys, redis_url, *command)
    else:
        with moto_s3("bucket") as endpoint:
            url = s3_url(endpoint, "bucket", "models/tiny", addressing_style="path")
            rdmaload.save(tiny_checkpoint.directory, url)
            document = run_json(capsys, url, *command)
    assert document["verdict"]
    assert any("chunk size" in advice for advice in document["advice"]) is (store == "redis")


@pytest.mark.parametrize("name", ["boto3", "obstore", "runai"])
@pytest.mark.parametrize("signed", ["by the url", "by the environment", "not"])
def test_an_s3_client_asks_with_the_credentials_of_the_url(
    name: str, signed: str, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rdmaload.cli import peers

    pytest.importorskip(peers.PEERS[name].module)
    contents = {path.name: path.read_bytes() for path in tiny_checkpoint.weight_files}
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable, raising=False)
    query: dict[str, object] = {"region": "eu-north-1"}
    if signed == "by the url":
        query |= {"username": "testing", "password": "secret"}
    elif signed == "not":
        query |= {"unsigned": "true"}
    else:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with HttpObjects({f"/bucket/m/{path}": content for path, content in contents.items()}) as server:
        url = f"s3://bucket/m?{urlencode({'endpoint_url': server.endpoint, **query})}"
        job = {"url": url, "scheme": "s3", "files": sorted(contents), "opts": {}, "device": "cpu"}
        answer = peers._run(name, job)
    tensors = name == "runai"  # the others read files whole
    assert answer["bytes"] == (tiny_checkpoint.bytes if tensors else sum(map(len, contents.values())))
    asked = [request.headers.get("authorization", "") for request in server.requests]
    assert asked
    for header in asked:
        assert header == "" if signed == "not" else "Credential=testing/" in header
        assert signed == "not" or "/eu-north-1/s3/" in header


def test_the_reason_is_the_error_and_not_the_end_of_its_text() -> None:
    from rdmaload.cli.peers import _last_error

    said = "Traceback (most recent call last):\n  x()\nobstore.exceptions.GenericError: no region\n\nDebug source:\n}\n"
    assert _last_error(said) == "obstore.exceptions.GenericError: no region"
    assert _last_error("Fatal Python error: x\nSegmentation fault\n") == "Segmentation fault"
    assert _last_error("") == ""


def test_a_loader_that_fails_is_left_out_and_the_others_go_on(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rdmaload.cli import peers

    run = peers._run

    def run_without_files(name: str, job: dict[str, Any]) -> dict[str, Any]:
        return run(name, {**job, "files": ["none.safetensors"]} if name == "safetensors" else job)

    monkeypatch.setattr(peers, "_run", run_without_files)
    assert main(["bench", str(tiny_checkpoint.directory), *SMALL, "--against", "safetensors", "--json"]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["against"]
    assert (ours["name"], ours["samples"]) == ("rdmaload", 2)
    assert "none.safetensors" in theirs["left_out"]


def test_the_way_to_a_gpu_is_the_limit_when_it_is() -> None:
    limit, text, advice = judged(to_device=figure(2.9), store={2: figure(9.0)}, fresh=figure(1.0))
    assert (limit, text) == ("pcie", "the way to the GPU (PCIe) is the limit: a load ran at 2.8 of 2.9 GB/s")
    assert "nvidia-smi" in advice
    assert judged(to_device=figure(25.0))[0] == "store"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--device", "cuda:0"], 1, "device='cuda:0'"),
        (["--device", "nonsense"], 1, "no device that torch knows"),
        (["--against", "safetensors,nope"], 2, "there is no loader 'nope'"),
        (["--plot", "bench.gif"], 2, "ends in .png, .svg, .html"),
        (["--plot", "/none/bench.html"], 2, "no directory '/none'"),
        (["--json", "/none/bench.json"], 2, "no directory '/none'"),
        (["--json=/"], 2, "is a directory"),
    ],
)
def test_what_bench_refuses(
    arguments: list[str], code: int, words: str, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if "cuda:0" in arguments and torch.cuda.is_available():
        arguments = ["--device", "cuda:99"]
        words = "device='cuda:99'"
    assert main(["bench", str(tiny_checkpoint.directory), *SMALL, *arguments]) == code
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


@pytest.mark.parametrize("command", ["bench", "load"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_picture_that_cannot_be_written_costs_no_result(
    command: str,
    as_json: bool,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full.html").symlink_to("/dev/full")
    picture = str(tmp_path / "full.html")
    directory = str(tiny_checkpoint.directory)
    work = ["bench", directory, *SMALL, "--plot"] if command == "bench" else ["load", directory, "--timeline"]
    assert main([*work, picture, *(["--json"] if as_json else [])]) == 1
    out, err = capsys.readouterr()
    assert "No space left on device" in err
    assert err.count("\n") == 1
    if as_json:
        assert json.loads(out)["url"].endswith(tiny_checkpoint.directory.name)
    else:
        assert "GB/s" in out
        assert "loaded" in out or "fresh memory" in out


@pytest.mark.parametrize("suffix", [".html", ".svg", ".png"])
def test_plots_hold_every_figure_and_need_nothing_else(suffix: str, tmp_path: Path) -> None:
    from rdmaload.cli.plot import Section, draw

    if suffix == ".png":
        pytest.importorskip("matplotlib")
    sections = [
        Section("Store", [dataclasses.replace(figure(1.0, 2.0, 4.0), name="<load> & more")]),
        Section("Loaders", [dataclasses.replace(figure(0.25), name="peer")]),
    ]
    path = tmp_path / f"plot{suffix}"
    if suffix == ".png":  # in a process of its own: matplotlib keeps its fonts open
        code = "import pickle, sys; from rdmaload.cli.plot import draw; draw(*pickle.load(sys.stdin.buffer))"
        given = pickle.dumps((path, "bench", ["the store is the limit"], sections))
        subprocess.run([sys.executable, "-c", code], input=given, check=True, timeout=120)
    else:
        draw(path, "bench redis://h/<m>", ["the store is the limit"], sections)
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    text = path.read_text()
    for shown in ("&lt;load&gt; &amp; more", "2.00 GB/s (1.00 to 4.00)", "0.25 GB/s", "bench redis://h/&lt;m&gt;"):
        assert shown in text
    assert "src=" not in text
    assert "href=" not in text
    if suffix == ".svg":
        root = ElementTree.fromstring(text)
        bars = [float(bar.get("width", 0)) for bar in root.iter("{http://www.w3.org/2000/svg}rect")]
        assert bars[1] == pytest.approx(2 * bars[0])  # each section has its own scale: a half, and all of it
    else:
        assert "the store is the limit" in text


def test_json_goes_to_a_file_and_the_lines_to_the_terminal(
    tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, out = str(tiny_checkpoint.directory), tmp_path / "out.json"
    for command in (["load", "--json", str(out), directory], ["load", directory, f"--json={out}"]):
        out.unlink(missing_ok=True)
        assert main(command) == 0
        assert "loaded " in capsys.readouterr().out
        assert json.loads(out.read_text())["tensors"] > 0
    for command in (["load", "--json", directory], ["load", directory, "--json"]):
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["tensors"] > 0
    out.unlink()
    assert main(["load", str(tmp_path / "none"), "--json", str(out)]) == 3
    assert not out.exists()
    assert capsys.readouterr().out == ""
