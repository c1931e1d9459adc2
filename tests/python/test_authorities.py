"""Whom `s3://` trusts, in small calls and for weights alike: those given, the variables', the system's, botocore's."""

from __future__ import annotations

import fcntl
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import rdmaload
from rdmaload.connectors import authorities
from rdmaload.connectors.authorities import given_authorities, system_authorities
from rdmaload.errors import AuthenticationError, NotSupportedError
from rdmaload.options import Options
from tests.support.certificates import Authority
from tests.support.checkpoints import Checkpoint, compare
from tests.support.s3 import HttpObjects, s3_url


@pytest.fixture(autouse=True)
def nobody_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without authorities, credentials, profiles and proxies."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy") or name == "REQUESTS_CA_BUNDLE":
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.setenv(name, "/nonexistent")


@pytest.fixture
def server(tiny_checkpoint: Checkpoint, authority: Authority) -> Iterator[HttpObjects]:
    objects = {f"/bucket/m/{path.name}": path.read_bytes() for path in tiny_checkpoint.directory.iterdir()}
    with HttpObjects(objects, tls=authority.issue()) as opened:
        opened.endpoint = opened.endpoint.replace("http://", "https://")
        yield opened


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    """One that certified nobody here."""
    return Authority(tmp_path, "other")


def directory_of(root: Path, *found: Authority) -> Path:
    directory = root / "authorities"
    directory.mkdir()
    for authority in found:
        (directory / authority.hashed_name).write_bytes(authority.ca_file.read_bytes())
    (directory / "README").write_text("not of a hashed name")
    (directory / "00000000.0").symlink_to("gone")
    return directory


def load(server: HttpObjects, checkpoint: Checkpoint, **options: object) -> None:
    """Byte-equal, by small calls and natively."""
    server.requests.clear()
    url = s3_url(server.endpoint, "bucket", "m", addressing_style="path", retry_timeout=1)
    assert compare(rdmaload.load(url, **options), checkpoint.directory) == checkpoint.bytes
    agents = {request.headers.get("user-agent", "").partition("/")[0] for request in server.requests}
    assert {"rdmaload", "Botocore"} <= agents


def test_authorities_of_a_directory_are_trusted(
    server: HttpObjects, tiny_checkpoint: Checkpoint, authority: Authority, other: Authority, tmp_path: Path
) -> None:
    directory = directory_of(tmp_path, authority, other)
    load(server, tiny_checkpoint, ca_dir=directory)
    load(server, tiny_checkpoint, ca_dir=directory, ca_file=other.ca_file)
    (directory / authority.hashed_name).unlink()
    load(server, tiny_checkpoint, ca_dir=directory, ca_file=authority.ca_file)
    with pytest.raises(AuthenticationError, match="certificate verify failed"):
        load(server, tiny_checkpoint, ca_dir=directory)


def test_only_those_that_are_given_are_trusted(
    server: HttpObjects,
    tiny_checkpoint: Checkpoint,
    authority: Authority,
    other: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, str(authority.ca_file))
    directory = directory_of(tmp_path, other)
    for options in ({"ca_file": other.ca_file}, {"ca_dir": directory}):
        with pytest.raises(AuthenticationError, match="certificate verify failed"):
            load(server, tiny_checkpoint, **options)


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_authorities_of_the_environment_are_trusted(
    variable: str,
    server: HttpObjects,
    tiny_checkpoint: Checkpoint,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(AuthenticationError, match="certificate verify failed"):
        load(server, tiny_checkpoint)
    monkeypatch.setenv(variable, str(authority.ca_file))
    load(server, tiny_checkpoint)


def test_authorities_that_only_a_directory_of_the_system_holds_are_trusted(
    server: HttpObjects,
    tiny_checkpoint: Checkpoint,
    authority: Authority,
    other: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", str(directory_of(tmp_path, authority)))
    load(server, tiny_checkpoint)
    monkeypatch.setenv("SSL_CERT_FILE", str(other.ca_file))
    load(server, tiny_checkpoint)


def test_where_the_system_trusts_nobody_botocores_own_authorities_hold_for_weights_too(
    server: HttpObjects, tiny_checkpoint: Checkpoint, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert system_authorities() is None
    monkeypatch.setattr("botocore.httpsession.where", lambda: str(authority.ca_file))
    load(server, tiny_checkpoint)


def test_what_holds_no_authorities_is_named(server: HttpObjects, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    empty = directory_of(tmp_path)
    for options, words in (
        ({"ca_dir": empty}, f"ca_dir={empty} .* openssl rehash"),
        ({"ca_dir": tmp_path / "none"}, f"ca_dir={tmp_path}/none .* cannot be read"),
        ({"ca_dir": empty, "ca_file": tmp_path / "none"}, f"ca_file={tmp_path}/none .* cannot be read"),
        ({"ca_file": tmp_path / "none"}, f"ca_file={tmp_path}/none"),
    ):
        with pytest.raises(AuthenticationError, match=words):
            load(server, tiny_checkpoint, **options)
    assert server.requests == []


def test_a_name_that_botocore_cannot_look_for_is_refused(server: HttpObjects, tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(NotSupportedError, match=r"server_name.*endpoint_url="):
        load(server, tiny_checkpoint, server_name="store.internal")
    assert server.requests == []


def test_a_directory_is_one_file_for_all_connectors_and_threads(authority: Authority, tmp_path: Path) -> None:
    options = Options(ca_dir=str(directory_of(tmp_path, authority)))
    found: list[str | None] = []
    threads = [
        threading.Thread(target=lambda: found.append(given_authorities(options, url="s3://b/m"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert found[0] is not None
    assert Path(found[0]).read_bytes().strip() == authority.ca_file.read_bytes().strip()


def test_a_file_that_could_not_be_written_is_not_taken_for_whole_later(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(ca_dir=str(directory_of(tmp_path, authority)))
    make = os.memfd_create

    def full(name: str) -> int:
        """No byte goes in, as where memory is limited."""
        descriptor = make(name, os.MFD_ALLOW_SEALING)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        return descriptor

    monkeypatch.setattr(authorities, "_descriptors", {})
    with monkeypatch.context() as failing:
        failing.setattr(os, "memfd_create", full)
        with pytest.raises(AuthenticationError):
            given_authorities(options, url="s3://bucket/m")
    path = given_authorities(options, url="s3://bucket/m")
    assert path is not None
    assert Path(path).read_bytes().startswith(b"-----BEGIN CERTIFICATE-----")


def test_an_unverified_store_is_loaded_where_warnings_are_errors(
    server: HttpObjects, tiny_checkpoint: Checkpoint
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(server, tiny_checkpoint, verify_tls=False)
