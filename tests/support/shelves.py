"""A place for one model in every kind of store of files, for the suite that all of them pass."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from tests.support.clouds import AzureBlobs, GoogleStorage
from tests.support.hub import Hub, Repository
from tests.support.s3 import HttpObjects, boto_client, moto_s3, s3_url
from tests.support.web import Nginx, RangedPython, RcloneS3, apache_pages

if TYPE_CHECKING:
    from tests.support.certificates import Authority

__all__ = ["SHELVES", "Shelf", "open_shelf"]

FOLDER = "models/a b"


@dataclass
class Shelf:
    """Where a model is to be, and how another tool would put files there."""

    url: str
    put: Callable[[str, bytes], None]
    options: Mapping[str, object] = field(default_factory=dict)
    path: str = "http"
    """What `stats.path` says of loads."""
    writable: bool = False
    keeps_manifest: bool = False
    lists_exactly: bool = True
    keeps_checksums: bool = False
    """Whether the store has a checksum of each whole object by itself."""


def _on_disk(root: Path) -> Callable[[str, bytes], None]:
    def put(path: str, data: bytes) -> None:
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        # A new file beside, moved into place: servers see a new tag at once.
        temporary = root.parent / "on its way"
        temporary.write_bytes(data)
        os.utime(temporary, ns=(put.clock, put.clock))  # type: ignore[attr-defined]
        put.clock += 2 * 10**9  # type: ignore[attr-defined]
        temporary.replace(place)

    put.clock = 1_700_000_000 * 10**9  # type: ignore[attr-defined]
    return put


@contextlib.contextmanager
def _moto(directory: Path, authority: Authority) -> Iterator[Shelf]:
    with moto_s3("bucket") as endpoint, contextlib.closing(boto_client(endpoint, checksums=False)) as client:

        def put(path: str, data: bytes) -> None:
            client.put_object(Bucket="bucket", Key=f"{FOLDER}/{path}", Body=data)

        yield Shelf(s3_url(endpoint, "bucket", FOLDER), put, writable=True, keeps_manifest=True)


@contextlib.contextmanager
def _rclone(directory: Path, authority: Authority) -> Iterator[Shelf]:
    root = directory / "served" / "bucket" / FOLDER
    root.mkdir(parents=True)
    with RcloneS3(directory / "served") as server:
        url = s3_url(server.endpoint, "bucket", FOLDER, addressing_style="path")
        yield Shelf(url, _on_disk(root), writable=True, keeps_manifest=True)


def _nginx(listing: str) -> Callable[[Path, Authority], contextlib.AbstractContextManager[Shelf]]:
    @contextlib.contextmanager
    def shelf(directory: Path, authority: Authority) -> Iterator[Shelf]:
        root = directory / "served" / FOLDER
        root.mkdir(parents=True)
        tls = authority if listing == "html" else None
        with Nginx(directory / "served", listing=listing, tls=tls) as server:
            options = {"ca_file": authority.ca_file} if tls else {}
            yield Shelf(f"{server.endpoint}/{quote(FOLDER)}", _on_disk(root), options)

    return shelf


@contextlib.contextmanager
def _python(directory: Path, authority: Authority) -> Iterator[Shelf]:
    root = directory / "served" / FOLDER
    root.mkdir(parents=True)
    with RangedPython(directory / "served") as server:
        yield Shelf(f"{server.endpoint}/{quote(FOLDER)}", _on_disk(root))


@contextlib.contextmanager
def _apache(directory: Path, authority: Authority) -> Iterator[Shelf]:
    with HttpObjects({}) as server:
        server.answer = apache_pages(server.objects)
        yield Shelf(
            f"{server.endpoint}/{quote(FOLDER)}/?sig=hush",
            lambda path, data: server.objects.__setitem__(f"/{FOLDER}/{path}", data),
        )


@contextlib.contextmanager
def _hf(directory: Path, authority: Authority) -> Iterator[Shelf]:
    repository = Repository()
    files: dict[str, bytes] = {}

    def put(path: str, data: bytes) -> None:
        files[path] = data
        commit = repository.branches.get("main", "0" * 40)
        # In place, as no hub would: what a file of one commit is never changes.
        repository.commits[commit] = files
        repository.branches["main"] = commit

    with Hub({"org/model": repository}) as hub:
        yield Shelf("hf://org/model", put, {"endpoint_url": hub.endpoint, "password": "good"})


@contextlib.contextmanager
def _google(directory: Path, authority: Authority) -> Iterator[Shelf]:
    with GoogleStorage("bucket", page=400) as server:
        options = {
            "endpoint_url": server.endpoint,
            "storage_options": {"service_account_key": server.service_account},
        }
        yield Shelf(
            f"gs://bucket/{quote(FOLDER)}",
            lambda path, data: server.objects.__setitem__(f"bucket/{FOLDER}/{path}", data),
            options,
            writable=True,
            keeps_manifest=True,
            keeps_checksums=True,
        )


def _azure(by_token: bool) -> Callable[[Path, Authority], contextlib.AbstractContextManager[Shelf]]:
    @contextlib.contextmanager
    def shelf(directory: Path, authority: Authority) -> Iterator[Shelf]:
        with AzureBlobs("bucket", page=400) as server:
            options: dict[str, object] = {"endpoint_url": f"{server.endpoint}/account", "username": "account"}
            if by_token:
                options["storage_options"] = {"token": "good-token"}
            else:
                options["password"] = server.key
            yield Shelf(
                f"az://bucket/{quote(FOLDER)}",
                lambda path, data: server.objects.__setitem__(f"bucket/{FOLDER}/{path}", data),
                options,
                path="python" if by_token else "http",
                writable=True,
                keeps_manifest=True,
            )

    return shelf


@contextlib.contextmanager
def _fsspec_local(directory: Path, authority: Authority) -> Iterator[Shelf]:
    root = directory / "served"
    root.mkdir()
    yield Shelf(f"fsspec+local://{root}", _on_disk(root), path="python", writable=True)


@contextlib.contextmanager
def _fsspec_memory(directory: Path, authority: Authority) -> Iterator[Shelf]:
    import fsspec

    system = fsspec.filesystem("memory")
    root = f"/{directory.name}/m"
    system.makedirs(root)
    yield Shelf(
        f"fsspec+memory:/{root}",
        lambda path, data: system.pipe_file(f"{root}/{path}", data),
        path="python",
        writable=True,
    )
    system.rm(root, recursive=True)


SHELVES: Mapping[str, Callable[[Path, Authority], contextlib.AbstractContextManager[Shelf]]] = {
    "s3-moto": _moto,
    "s3-rclone": _rclone,
    "https-nginx-html": _nginx("html"),
    "http-nginx-json": _nginx("json"),
    "http-python": _python,
    "http-apache": _apache,
    "hf": _hf,
    "gs": _google,
    "az": _azure(by_token=False),
    "az-token": _azure(by_token=True),
    "fsspec-local": _fsspec_local,
    "fsspec-memory": _fsspec_memory,
}


def open_shelf(name: str, directory: Path, authority: Authority) -> contextlib.AbstractContextManager[Shelf]:
    """The shelf of that name, empty; `directory` is its own."""
    return SHELVES[name](directory, authority)
