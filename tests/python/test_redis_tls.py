"""Redis and Valkey over TLS and unix sockets: whole loads, trust, users, and what goes wrong."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from test_redis_connector import closed_while_busy, open_redis

import rdmaload
from rdmaload import LoadStats, Options, _core
from rdmaload.errors import (
    AuthenticationError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)
from tests.support.certificates import Authority
from tests.support.checkpoints import Checkpoint, compare
from tests.support.fault_proxy import FaultProxy
from tests.support.faults import Close, Fault, FlipBit, Reset, Stall
from tests.support.servers import RedisServer

SECRET = "s3cret/@:% ü"


@pytest.fixture(params=["tls_server", "valkey_server", "unix_server"])
def server(request: pytest.FixtureRequest) -> RedisServer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, RedisServer)
    return found


def path_of(server: RedisServer) -> str:
    return "resp-tls" if server.tls is not None else "resp-unix"


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("verify", ["auto", "off"])
def test_a_model_comes_back_byte_for_byte(
    server: RedisServer, model: str, tiny_checkpoint: Checkpoint, tmp_path: Path, protocol: int, verify: str
) -> None:
    url = server.url(model, protocol=protocol, verify=verify)
    saved = rdmaload.save(tiny_checkpoint.directory, url)
    stats = LoadStats()
    state = rdmaload.load(url, stats=stats)
    assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
    assert saved.path == stats.path == path_of(server)
    assert (stats.copied_bytes, stats.fallback_reason, stats.retries) == (0, None, 0)
    part = rdmaload.load(url, include=next(iter(state)))
    assert len(part) == 1
    for name, tensor in part.items():
        assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8))
    pulled = rdmaload.pull_files(url, tmp_path / "pulled", allow_pattern="*.json")
    for file in pulled.glob("*.json"):
        assert file.read_bytes() == (tiny_checkpoint.directory / file.name).read_bytes()
    assert list(pulled.glob("*.json"))


@pytest.mark.parametrize("where", ["in the url", "beside it"])
def test_another_process_loads_what_the_first_pinned(
    server: RedisServer, model: str, tiny_checkpoint: Checkpoint, where: str
) -> None:
    url, options = server.url(model), Options()
    rdmaload.save(tiny_checkpoint.directory, url)
    if where == "beside it":
        url, options = apart(server, model)
    with rdmaload.open(url, options=options) as first:
        options = dataclasses.replace(options, generation=first.generation)
    program = (
        "import pickle, sys, rdmaload\n"
        "url, options = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "stats = rdmaload.LoadStats()\n"
        "state = rdmaload.load(url, options=options, stats=stats)\n"
        "print(stats.path, stats.generation, sum(t.nbytes for t in state.values()))\n"
    )
    told = pickle.dumps((url, options)).hex()
    done = subprocess.run([sys.executable, "-c", program, told], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [path_of(server), options.generation, str(tiny_checkpoint.bytes)], done.stderr


def apart(server: RedisServer, model: str) -> tuple[str, Options]:
    """The url without options, and the options."""
    if server.tls is None:
        return server.url(model), Options()
    options = Options(ca_file=str(server.tls.ca_file))
    if server.client_certificate is not None:
        files = server.client_certificate
        options = dataclasses.replace(
            options, client_cert_file=str(files.cert_file), client_key_file=str(files.key_file)
        )
    return server.url(model).partition("?")[0], options


def test_leaving_without_closing_ends_the_process_in_order(
    server: RedisServer, model: str, tiny_checkpoint: Checkpoint
) -> None:
    url = server.url(model)
    rdmaload.save(tiny_checkpoint.directory, url)
    program = (
        "import sys, rdmaload\n"
        "iterator = rdmaload.open(sys.argv[1]).weight_iterator(window_bytes=200000)\n"
        "next(iterator)\n"
        "print('left')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def test_doctor_describes_the_server(server: RedisServer, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rdmaload.cli import main

    assert main(["doctor", server.url(model)]) == 0
    said = capsys.readouterr().out
    assert f"{server.family} " in said
    assert "OpenSSL 3" in said


def test_close_ends_a_command_that_waits_over_tls(authority: Authority) -> None:
    with RedisServer(tls=authority) as server, FaultProxy(server.host, server.port) as proxy:
        connector = open_redis(through(proxy, server, "m"), inactivity_timeout=60)
        assert connector.get("m/a") is None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            asked = proxy.bytes_to_server
            closed_while_busy(connector, lambda: eventually(lambda: proxy.bytes_to_server > asked))
        finally:
            os.kill(server.pid, signal.SIGCONT)


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def test_close_ends_a_handshake(tls_server: RedisServer) -> None:
    with FaultProxy(tls_server.host, tls_server.port, Stall(after=0)) as proxy:
        connector = open_redis(through(proxy, tls_server, "m"), connect_timeout=60)
        closed_while_busy(connector, proxy.wait_for_fault)


# ---- trust -----------------------------------------------------------------------------------------------------------


def native(url: str, **options: Any) -> None:
    """Reads through the native transport alone, without the control client before it."""
    with open_redis(url, retry_timeout=0.5, max_integrity_attempts=1, **options) as connector:
        transport = connector.native_transport()
        read_one(transport)


def read_one(transport: object) -> bytes:
    assert isinstance(transport, _core.Transport)
    index = _core.TensorIndex()
    header = b'{"t":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'
    index.add_file(0, "f", 8 + len(header) + 8, header)
    size = 8 + len(header) + 8
    layout = _core.StoreLayout([("probe", size, 0)], size, True, b"")
    plan = _core.plan_into_arenas(index, layout, [0], _core.PlanLimits())
    arena = _core.HostArena(plan.region_bytes[0])
    operation = _core.LoadOperation(
        transport, layout, plan, [arena], verify=False, max_integrity_attempts=1, retry_timeout=0.5
    )
    operation.start()
    while not operation.wait_for(1.0):
        pass
    operation.throw_if_failed()
    return bytes(memoryview(arena))


def control(url: str, **options: Any) -> None:
    with open_redis(url, retry_timeout=0.5, **options) as connector:
        connector.get("m/a")


BOTH = pytest.mark.parametrize("use", [control, native])


def check_refused(kind: type[RdmaloadError], words: list[str], use: Callable[[], object]) -> RdmaloadError:
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        use()
    said = "".join(traceback.format_exception(caught.value))
    for word in words:
        assert word in str(caught.value)
    assert SECRET not in said
    assert time.monotonic() - started < 60
    return caught.value


@BOTH
@pytest.mark.parametrize(
    ("issue", "words"),
    [
        ({"days": (-9, -1)}, ["expired", "renew"]),
        ({"days": (1, 9)}, ["not yet valid", "clock"]),
        ({"self_signed": True}, ["self-signed", "ca_file="]),
        ({"names": ("store.example",)}, ["mismatch", "127.0.0.1", "server_name="]),
        ({"names": ("10.9.8.7", "localhost")}, ["mismatch", "127.0.0.1", "server_name="]),
    ],
    ids=["expired", "not-yet", "self-signed", "wrong-name", "wrong-address"],
)
def test_a_certificate_that_is_not_good_is_refused_unless_verification_is_off(
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
    issue: dict[str, Any],
    words: list[str],
    use: Callable[..., object],
) -> None:
    with RedisServer(tls=authority, certificate=authority.issue(**issue), password=SECRET) as server:
        check_refused(AuthenticationError, words, lambda: use(server.url("m")))
        assert not caplog.records
        accept(server, verify_tls=False)
        assert ["verify_tls is off" in record.message for record in caplog.records] == [True]
        assert SECRET not in caplog.text
        if "names" in issue:
            accept(server, server_name=issue["names"][0])


def accept(server: RedisServer, **options: Any) -> None:
    with server.client() as client:
        client.set("probe0", bytes(61) + b"8 bytes!")
    with open_redis(server.url("m"), **options) as connector:
        assert connector.get("probe0") == bytes(61) + b"8 bytes!"
        assert read_one(connector.native_transport())[:8] == b"8 bytes!"


@BOTH
def test_the_systems_store_does_not_know_a_tests_authority(tls_server: RedisServer, use: Callable[..., object]) -> None:
    url = f"rediss://{tls_server.host}:{tls_server.port}/m"
    check_refused(AuthenticationError, ["ca_file="], lambda: use(url))


@BOTH
def test_another_authority_is_refused(tls_server: RedisServer, tmp_path: Path, use: Callable[..., object]) -> None:
    other = Authority(tmp_path, "other")
    url = f"rediss://{tls_server.host}:{tls_server.port}/m?ca_file={other.ca_file}"
    check_refused(AuthenticationError, ["certificate", "ca_file="], lambda: use(url))


@BOTH
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_server_that_wants_a_certificate_says_so(
    authority: Authority, tmp_path: Path, use: Callable[..., object], version: str
) -> None:
    with RedisServer(tls=authority, tls_clients=True, args=["--tls-protocols", version]) as server:
        url = f"rediss://{server.host}:{server.port}/m?ca_file={authority.ca_file}"
        check_refused(AuthenticationError, ["refused us", "client_cert_file="], lambda: use(url))
        stranger = Authority(tmp_path, "stranger").issue()
        files = f"&client_cert_file={stranger.cert_file}&client_key_file={stranger.key_file}"
        check_refused(AuthenticationError, ["refused us", "client_cert_file="], lambda: use(url + files))
        together = tmp_path / "both.pem"
        assert server.client_certificate is not None
        mine = server.client_certificate
        together.write_bytes(mine.key_file.read_bytes() + mine.cert_file.read_bytes())
        accept(server)
        with open_redis(f"{url}&client_cert_file={together}") as connector:
            assert read_one(connector.native_transport())[:8] == b"8 bytes!"


@pytest.mark.parametrize("option", ["ca_file", "ca_dir", "client_cert_file", "client_key_file"])
def test_a_file_that_is_not_there_is_named(authority: Authority, option: str) -> None:
    issued = authority.issue()
    options = {option: "/no/such.pem"}
    if option == "client_key_file":
        options["client_cert_file"] = str(issued.cert_file)
    check_refused(
        AuthenticationError,
        [f"{option}=/no/such.pem", "No such file", "rediss://:***@h/m"],
        lambda: open_redis(f"rediss://:{quote(SECRET, safe='')}@h/m", **options),
    )


def test_files_that_hold_something_else_are_named(authority: Authority, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(bytes(range(256)))
    locked = authority.issue(password=b"secret")
    one, other = authority.issue(), authority.issue()
    for options, words in (
        ({"ca_file": garbage}, [f"ca_file={garbage}"]),
        ({"client_cert_file": garbage}, [f"client_cert_file={garbage}"]),
        ({"client_cert_file": one.cert_file, "client_key_file": other.key_file}, ["client_key_file=", "mismatch"]),
        ({"client_cert_file": locked.cert_file, "client_key_file": locked.key_file}, ["encrypted"]),
    ):
        check_refused(AuthenticationError, words, lambda options=options: open_redis("rediss://h/m", **options))


def test_tls_options_without_tls_are_refused_rather_than_ignored() -> None:
    for url in ("redis://h/m", "valkey://h/m", "redis+unix:///s?model=m"):
        for option, value in (
            ("ca_file", "/x"),
            ("server_name", "h"),
            ("client_cert_file", "/x"),
            ("verify_tls", False),
        ):
            scheme = "valkeys://" if url.startswith("valkey") else "rediss://"
            words = [option, "without TLS", f"write {scheme}"]
            check_refused(UrlError, words, lambda u=url, o={option: value}: open_redis(u, **o))
    check_refused(UrlError, ["client_cert_file"], lambda: open_redis("rediss://h/m?client_key_file=/x"))
    for bad in ("1", "yes", "none", ""):
        check_refused(
            UrlError, ["verify_tls", "true or false"], lambda bad=bad: open_redis(f"rediss://h/m?verify_tls={bad}")
        )


def test_the_place_of_a_key_is_no_secret() -> None:
    url = rdmaload.urls.parse_url("rediss://h/m?client_cert_file=/c&client_key_file=/k")
    assert "client_key_file=/k" in url.redacted


def test_a_build_or_a_machine_without_openssl_is_named(
    tls_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise NotSupportedError("TLS needs OpenSSL's libssl.so.3")

    monkeypatch.setattr(_core, "TlsContext", refuse)
    with open_redis(tls_server.url("m")) as connector:
        assert connector.get("m/none") is None  # what needs no native transport goes on
        error = check_refused(NotSupportedError, ["OpenSSL", "rediss://"], connector.native_transport)
    assert error.url == connector.url


# ---- the wrong port --------------------------------------------------------------------------------------------------


@BOTH
def test_plain_text_at_a_tls_port(tls_server: RedisServer, use: Callable[..., object]) -> None:
    url = f"redis://{tls_server.host}:{tls_server.port}/m"
    words = ["rediss://"] if use is control else []
    check_refused(UnavailableError, words, lambda: use(url, inactivity_timeout=1, connect_timeout=1))


@BOTH
def test_tls_at_a_plain_port(redis_server: RedisServer, use: Callable[..., object]) -> None:
    url = f"rediss://{redis_server.host}:{redis_server.port}/m"
    with pytest.raises((UnavailableError, LoadTimeoutError)) as caught:
        use(url, connect_timeout=1)
    assert "TLS" in str(caught.value)


@BOTH
def test_a_socket_that_is_not_there(tmp_path: Path, use: Callable[..., object]) -> None:
    check_refused(
        UnavailableError, [f"{tmp_path}/none", "No such file"], lambda: use(f"redis+unix://{tmp_path}/none?model=m")
    )


def test_a_path_that_no_socket_has_is_refused_at_once(tmp_path: Path) -> None:
    for letter, fits in (("s", 107), ("ü", 53)):
        path = "/" + letter * (fits - 1 if letter == "s" else fits)
        assert len(os.fsencode(path)) == 107
        open_redis(f"redis+unix://{path}?model=m").close()
        check_refused(UrlError, ["has 108 bytes", "107"], lambda path=path: open_redis(f"redis+unix://{path}s?model=m"))


def test_a_file_in_place_of_a_directory_of_authorities(authority: Authority) -> None:
    for url in ("rediss://h/m", "s3://bucket/m"):
        with pytest.raises(UrlError, match=f"ca_dir={authority.ca_file} for {url} is no directory; .* ca_file="):
            rdmaload.open(url, ca_dir=authority.ca_file)


# ---- users -----------------------------------------------------------------------------------------------------------


USERS = [
    f"reader on >{SECRET.replace(' ', '_')} ~allowed/* ~rdmaload:models +get +getrange +exists +select +scan +strlen",
    "other on nopass ~other/* +@all",
]


@pytest.fixture(scope="module", params=["tls", "unix", "tcp"])
def guarded(request: pytest.FixtureRequest, authority: Authority, tiny_checkpoint: Checkpoint) -> Iterator[RedisServer]:
    kind: dict[str, Any] = {"tls": {"tls": authority}, "unix": {"unix": True}, "tcp": {}}[request.param]
    with RedisServer(users=USERS, **kind) as server:
        rdmaload.save(tiny_checkpoint.directory, server.url("allowed/model"))
        yield server


def as_user(url: str, user: str, password: str | None) -> str:
    scheme, _, rest = url.partition("://")
    secret = "" if password is None else ":" + quote(password, safe="")
    return f"{scheme}://{user}{secret}@{rest}"


def test_a_user_with_few_rights_loads(
    guarded: RedisServer, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = SECRET.replace(" ", "_")
    file = tmp_path / "password"
    file.write_text(password + "\n")
    monkeypatch.setenv("MODEL_STORE_PASSWORD", password)
    url = guarded.url("allowed/model")
    for text, options in (
        (as_user(url, "reader", password), {}),
        (as_user(url, "reader", None), {"password_file": file}),
        (url, {"username": "reader", "password_env": "MODEL_STORE_PASSWORD"}),
    ):
        for protocol in (2, 3):
            state = rdmaload.load(text, protocol=protocol, **options)
            assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
    with rdmaload.open(as_user(url, "reader", password)) as opened:
        assert password not in repr(opened)
        assert quote(password, safe="") not in repr(opened)


@pytest.mark.parametrize("layout", ["rdmaload", "sglang"])
def test_the_rights_that_the_documentation_names_are_enough(layout: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    found = re.search(r"only loads needs `([^`]+)`; one that saves needs `([^`]+)`", text)
    assert found is not None
    loads, saves = found.groups()
    users = [
        f"loads on nopass {loads.replace('MODEL', 'allowed/model')}",
        f"saves on nopass ~allowed/model/* ~rdmaload:models {saves}",
    ]
    tensors = {"w": torch.arange(100.0), "b": torch.ones(3)}
    with RedisServer(users=users) as server:
        url = as_user(server.url("allowed/model"), "loads", "any")
        for pinned in ({}, {"generation": "0" * 32}):
            with pytest.raises(NotFoundError, match="there is no model") as caught:
                rdmaload.open(url, **pinned)
            assert "ACL" not in str(caught.value)
        for factor in (1, 2):
            saved = {name: factor * tensor for name, tensor in tensors.items()}
            rdmaload.save(saved, as_user(server.url("allowed/model"), "saves", "any"), layout=layout)
            loaded = rdmaload.load(url)
            assert all(torch.equal(loaded[name], saved[name]) for name in saved)
            assert rdmaload.load(url, include="b", verify="off")["b"][0] == factor
        with rdmaload.open(url) as opened:
            assert opened.store_layout == layout
            opened.verify()


def test_what_a_user_may_not_do_is_said_without_the_password(guarded: RedisServer, tiny_checkpoint: Checkpoint) -> None:
    password = SECRET.replace(" ", "_")
    url = as_user(guarded.url("allowed/model"), "reader", password)
    for use in (
        lambda: rdmaload.save(tiny_checkpoint.directory, url),
        lambda: rdmaload.load(as_user(guarded.url("allowed/model"), "other", "x")),
        lambda: rdmaload.load(as_user(guarded.url("elsewhere"), "reader", password)),
        lambda: native(as_user(guarded.url("m"), "reader", password)),
        lambda: native(as_user(guarded.url("m"), "reader", "wrong" + password)),
    ):
        with pytest.raises(AuthenticationError, match=r"ACL|password_file") as caught:
            use()
        said = "".join(traceback.format_exception(caught.value))
        assert password not in said
        assert quote(password, safe="") not in said


# ---- faults on the way -----------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tls_server: RedisServer, model: str, tiny_checkpoint: Checkpoint) -> str:
    rdmaload.save(tiny_checkpoint.directory, tls_server.url(model))
    return model


def through(proxy: FaultProxy, server: RedisServer, model: str) -> str:
    return server.url(model).replace(f":{server.port}/", f":{proxy.port}/")


# Within the handshake, right after it, and within records of payload.
@pytest.mark.parametrize("after", [100, 2500, 300_001, 1_000_000])
@pytest.mark.parametrize("fault", [Close, Reset, Stall])
def test_a_connection_that_is_cut_or_stalls_in_a_record_is_made_anew(
    tls_server: RedisServer, stored: str, tiny_checkpoint: Checkpoint, fault: Callable[..., Fault], after: int
) -> None:
    with FaultProxy(tls_server.host, tls_server.port) as proxy:
        url = through(proxy, tls_server, stored)
        with rdmaload.open(url, connections=1, inactivity_timeout=0.5, connect_timeout=0.5) as opened:
            first = proxy.connections + 1
            proxy.set_faults(fault(after=after, first_connections=first))
            stats = LoadStats()
            state = opened.load(stats=stats)
        assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert stats.path == "resp-tls"
        assert stats.retries > 0
        assert proxy.fired == 1


def test_a_bit_that_flips_on_the_way_breaks_its_record_and_is_read_again(
    tls_server: RedisServer, stored: str, tiny_checkpoint: Checkpoint
) -> None:
    with FaultProxy(tls_server.host, tls_server.port) as proxy:
        with rdmaload.open(through(proxy, tls_server, stored), connections=1) as opened:
            proxy.set_faults(FlipBit(offset=700_000))
            stats = LoadStats()
            state = opened.load(stats=stats)
        assert proxy.fired == 1
    assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
    assert stats.retries > 0


@pytest.mark.parametrize(("fault", "kind"), [(Close, UnavailableError), (Stall, LoadTimeoutError)])
def test_faults_that_stay_are_errors_in_time(
    tls_server: RedisServer, stored: str, fault: Callable[..., Fault], kind: type[RdmaloadError]
) -> None:
    with FaultProxy(tls_server.host, tls_server.port) as proxy:
        url = through(proxy, tls_server, stored)
        with rdmaload.open(url, inactivity_timeout=0.3, connect_timeout=0.3, retry_timeout=1) as opened:
            proxy.set_faults(fault(after=100_000))
            with pytest.raises(kind, match="chunks"):
                opened.load()


def test_a_good_connection_is_not_logged(
    tls_server: RedisServer, stored: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rdmaload"):
        rdmaload.load(tls_server.url(stored))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
