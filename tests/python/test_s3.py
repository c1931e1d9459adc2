"""Models in S3: against moto for what S3 answers, and against a server that does what no S3 should."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

import rdmaload
from rdmaload._core import crc32c
from rdmaload.connectors import connector_for
from rdmaload.connectors.proxies import split_proxy
from rdmaload.connectors.s3 import S3Connector
from rdmaload.connectors.s3_upload import S3Upload, crc_text
from rdmaload.errors import (
    AlreadyExistsError,
    AuthenticationError,
    FormatError,
    IntegrityError,
    LayoutMismatchError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    StaleGenerationError,
    UnavailableError,
    UrlError,
)
from rdmaload.stats import LoadStats
from tests.support.certificates import Authority
from tests.support.checkpoints import Checkpoint, compare, llama_like, make_checkpoint
from tests.support.s3 import ConnectProxy, HttpObjects, Reply, Request, boto_client, moto_s3, s3_url
from tests.support.servers import RedisServer


@pytest.fixture(scope="module", autouse=True)
def clean_environment() -> Iterator[None]:
    """No credentials, profiles or proxies of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_") or name.lower().endswith("_proxy"):
                patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_s3("bucket") as found:
        yield found


@pytest.fixture
def url(endpoint: str, model: str) -> str:
    return s3_url(endpoint, "bucket", f"models/{model}")


def put(endpoint: str, key: str, data: bytes) -> None:
    client = boto_client(endpoint, checksums=False)
    client.put_object(Bucket="bucket", Key=key, Body=data)
    client.close()


def upload(endpoint: str, model: str, checkpoint: Checkpoint) -> None:
    """As another tool would: plain files, no manifest."""
    for path in checkpoint.directory.iterdir():
        put(endpoint, f"models/{model}/{path.name}", path.read_bytes())


def objects_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {f"/bucket/m/{path.name}": path.read_bytes() for path in checkpoint.directory.iterdir()}


def assert_loaded(state: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    from safetensors.torch import load_file

    expected: dict[str, torch.Tensor] = {}
    for path in checkpoint.directory.glob("*.safetensors"):
        expected |= load_file(path)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name].view(torch.uint8).reshape(-1), tensor.view(torch.uint8).reshape(-1)), name


def test_plain_files_are_loaded_byte_equal_and_counted_as_unverified(
    endpoint: str, url: str, model: str, tiny_checkpoint: Checkpoint
) -> None:
    upload(endpoint, model, tiny_checkpoint)
    stats = LoadStats()
    assert_loaded(rdmaload.load(url, stats=stats), tiny_checkpoint)
    assert (stats.path, stats.connections, stats.generation) == ("http", 16, None)
    assert stats.unverified_bytes == stats.read_bytes >= stats.bytes > 0
    assert stats.verified_bytes == 0
    with pytest.raises(IntegrityError, match="no checksums"):
        rdmaload.load(url, verify="require")


def test_a_saved_model_comes_back_verified_through_every_door(
    url: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    saved = rdmaload.save(tiny_checkpoint.directory, url, chunk_bytes=100_000)
    assert saved.published
    stats = LoadStats()
    assert_loaded(rdmaload.load(url, verify="require", stats=stats), tiny_checkpoint)
    assert stats.generation == saved.generation is not None
    assert stats.verified_bytes == stats.read_bytes > 0
    assert stats.unverified_bytes == 0
    assert_loaded(dict(rdmaload.weight_iterator(url, window_bytes=500_000)), tiny_checkpoint)
    target = {name: torch.empty_like(tensor) for name, tensor in rdmaload.load(url).items()}
    rdmaload.load_into(target, url)
    assert_loaded(target, tiny_checkpoint)
    pulled = rdmaload.pull_files(url, tmp_path / "pulled", allow_pattern="*")
    for path in tiny_checkpoint.directory.iterdir():
        assert (pulled / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in pulled.iterdir()} == {path.name for path in tiny_checkpoint.directory.iterdir()}
    with rdmaload.open(url, generation=saved.generation) as model:
        assert model.kind == "checkpoint"
        assert model.manifest is not None
        model.verify()
    with pytest.raises(StaleGenerationError):
        rdmaload.open(url, generation="0" * 32)
    with pytest.raises(IntegrityError, match="manifest_sha256"):
        rdmaload.open(url, manifest_sha256="0" * 64)


def test_a_state_dict_with_an_empty_tensor_goes_there_and_back(url: str) -> None:
    source = {"a": torch.arange(1000.0), "empty": torch.empty(0, 3), "b": torch.ones(7, dtype=torch.bfloat16)}
    rdmaload.save(source, url)
    loaded = rdmaload.load(url)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.items())


def test_large_files_go_in_parts_and_come_back_byte_equal(endpoint: str, url: str, model: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    content = random.Random(3).randbytes(40 * 2**20 + 12345)
    (source / "big.bin").write_bytes(content)
    (source / "empty.bin").write_bytes(b"")
    rdmaload.save(source, url, threads=3)
    client = boto_client(endpoint)
    stored = client.get_object(Bucket="bucket", Key=f"models/{model}/big.bin")
    assert stored["ETag"].endswith('-3"')  # 16 MiB, 16 MiB and the rest
    assert stored["Body"].read() == content
    assert client.list_multipart_uploads(Bucket="bucket").get("Uploads", []) == []
    client.close()
    pulled = rdmaload.pull_files(url, tmp_path / "pulled", allow_pattern="*")
    assert (pulled / "big.bin").read_bytes() == content
    assert (pulled / "empty.bin").read_bytes() == b""


def test_an_interrupted_save_sends_finished_files_only_once(
    endpoint: str, url: str, model: str, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_object = S3Connector.put

    def breaks(self: S3Connector, path: str, data: bytes | bytearray) -> str:
        if path == "config.json":
            raise UnavailableError("the network broke")
        return put_object(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(S3Connector, "put", breaks)
        with pytest.raises(UnavailableError, match="broke"):
            rdmaload.save(tiny_checkpoint.directory, url)
    with connector_for(url) as connector:
        assert isinstance(connector, S3Connector)
        assert connector.read_small(".rdmaload/manifest") is None
    stats = rdmaload.save(tiny_checkpoint.directory, url)
    weights = sum(path.stat().st_size for path in tiny_checkpoint.directory.glob("*.safetensors"))
    assert weights <= stats.skipped_bytes < stats.bytes
    assert_loaded(rdmaload.load(url, verify="require"), tiny_checkpoint)
    client = boto_client(endpoint)
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="bucket", Prefix=f"models/{model}/")["Contents"]]
    client.close()
    assert not [key for key in keys if "/saving/" in key]
    assert len([key for key in keys if key.endswith("/index")]) == 1


def _md5(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@pytest.mark.parametrize(
    ("there", "is_sent"),
    [
        ({"Size": 4, "ETag": '"x"', "ChecksumCRC32C": crc_text(crc32c(b"part"))}, False),
        (
            {"Size": 4, "ETag": _md5(b"part"), "ChecksumCRC32C": crc_text(crc32c(b"trap"))},
            True,
        ),
        ({"Size": 4, "ETag": _md5(b"part")}, False),
        ({"Size": 4, "ETag": _md5(b"trap")}, True),
        ({"Size": 5, "ETag": '"x"', "ChecksumCRC32C": crc_text(crc32c(b"part"))}, True),
        ({}, True),
    ],
)
def test_a_part_that_is_there_is_told_by_its_checksum(there: dict[str, object], is_sent: bool) -> None:
    sent: list[dict[str, object]] = []

    class Client:
        def upload_part(self, **arguments: object) -> dict[str, object]:
            sent.append(arguments)
            return {"ETag": "new"}

    upload = S3Upload(Client(), lambda verb, path, work: work(), "f", {"UploadId": "u"}, {1: there})
    assert upload.send(1, b"part") is is_sent
    assert [part["Body"] for part in sent] == [b"part"] * is_sent


def test_parts_of_an_interrupted_upload_are_not_sent_again(
    endpoint: str, url: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    content = random.Random(5).randbytes(40 * 2**20)
    (source / "big.bin").write_bytes(content)
    send = S3Upload.send
    new: list[int] = []

    def watched(self: S3Upload, number: int, data: bytes | bytearray) -> bool:
        if number == broken:
            raise UnavailableError("the network broke")
        if sent := send(self, number, data):
            new.append(number)
        return sent

    monkeypatch.setattr(S3Upload, "send", watched)
    broken = 3
    with pytest.raises(UnavailableError, match="broke"):
        rdmaload.save(source, url, threads=1)
    client = boto_client(endpoint)
    assert len(client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])) == 1
    assert new == [1, 2]
    broken = 0
    stats = rdmaload.save(source, url, threads=2)
    assert new == [1, 2, 3]
    assert stats.skipped_bytes == 32 * 2**20
    assert client.list_multipart_uploads(Bucket="bucket").get("Uploads", []) == []
    assert client.get_object(Bucket="bucket", Key=f"models/{model}/big.bin")["Body"].read() == content
    assert len(kept(endpoint, model)) == 2  # manifest and index: no note is left
    # What is not the same bytes is sent, though its upload is known.
    broken = 3
    changed = content[:-5] + b"other"
    (source / "big.bin").write_bytes(changed)
    with pytest.raises(UnavailableError):
        rdmaload.save(source, url, threads=1)
    upload = client.list_multipart_uploads(Bucket="bucket")["Uploads"][0]
    place = {"Bucket": "bucket", "Key": upload["Key"], "UploadId": upload["UploadId"]}
    client.upload_part(**place, PartNumber=2, Body=bytes(16 * 2**20))
    client.close()
    new.clear()
    broken = 0
    rdmaload.save(source, url, threads=1)
    assert new == [2, 3]
    pulled = rdmaload.pull_files(url, tmp_path / "pulled", allow_pattern="*")
    assert (pulled / "big.bin").read_bytes() == changed


def test_a_failed_upload_that_nobody_can_go_on_with_leaves_no_parts_behind(
    endpoint: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: S3Upload, number: int, data: bytes | bytearray) -> bool:
        raise UnavailableError("the network broke")

    monkeypatch.setattr(S3Upload, "send", breaks)
    with pytest.raises(UnavailableError, match="broke"):
        rdmaload.save({"w": torch.zeros(5 * 2**20)}, url)
    client = boto_client(endpoint)
    assert client.list_multipart_uploads(Bucket="bucket").get("Uploads", []) == []
    client.close()


def test_saving_again_replaces_the_model_and_its_stale_files(endpoint: str, url: str, model: str) -> None:
    rdmaload.save({"a": torch.ones(3)}, url)
    put(endpoint, f"models/{model}/model-00002-of-00002.safetensors", b"old")
    with pytest.raises(AlreadyExistsError):
        rdmaload.save({"a": torch.zeros(3)}, url, overwrite=False)
    rdmaload.save({"a": torch.zeros(3)}, url)
    assert torch.equal(rdmaload.load(url)["a"], torch.zeros(3))
    client = boto_client(endpoint)
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="bucket", Prefix=f"models/{model}/")["Contents"]]
    client.close()
    assert len(keys) == 3  # the file, the manifest, its index


def test_ranks_of_a_sharded_model_save_side_by_side_and_the_last_publishes(url: str) -> None:
    rdmaload.save({"w": torch.zeros(9)}, url)  # an older model, whose manifest would call the new files damaged
    saved = [
        rdmaload.save({"w": torch.full((4,), float(rank))}, url, rank=rank, world_size=2, save_id="one")
        for rank in range(2)
    ]
    assert [stats.published for stats in saved] == [False, True]
    for rank in range(2):
        stats = LoadStats()
        state = rdmaload.load(url, rank=rank, verify="require", stats=stats)
        assert torch.equal(state["w"], torch.full((4,), float(rank)))
        assert stats.generation == saved[1].generation
    with rdmaload.open(url) as model:
        assert (model.kind, model.world_size) == ("sharded", 2)
        model.verify()
    # A rank that died after it had finished comes again: the same model.
    again = rdmaload.save({"w": torch.zeros(4)}, url, rank=0, world_size=2, save_id="one")
    assert again.published
    assert torch.equal(rdmaload.load(url, rank=1, verify="require")["w"], torch.ones(4))


def test_ranks_that_save_at_once_publish_one_model(url: str, endpoint: str, model: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda rank: rdmaload.save(
                    {"w": torch.full((1000,), float(rank))}, url, rank=rank, world_size=4, save_id="many"
                ),
                range(4),
            )
        )
    for rank in range(4):
        state = rdmaload.load(url, rank=rank, verify="require")
        assert torch.equal(state["w"], torch.full((1000,), float(rank)))
    assert len(kept(endpoint, model)) == 2 + 4  # manifest, one index, the parts


def test_ranks_that_do_not_fit_together_publish_nothing(url: str) -> None:
    rdmaload.save({"w": torch.zeros(4)}, url, rank=0, world_size=2, save_id="odd", chunk_bytes=1000)
    with pytest.raises(LayoutMismatchError, match="chunk size"):
        rdmaload.save({"w": torch.zeros(4)}, url, rank=1, world_size=2, save_id="odd", chunk_bytes=2000)
    with rdmaload.open(url) as opened:
        assert opened.manifest is None


def kept(endpoint: str, model: str) -> list[str]:
    client = boto_client(endpoint)
    found = client.list_objects_v2(Bucket="bucket", Prefix=f"models/{model}/.rdmaload/").get("Contents", [])
    client.close()
    return [entry["Key"] for entry in found]


def keys_of(endpoint: str, model: str) -> set[str]:
    client = boto_client(endpoint)
    found = client.list_objects_v2(Bucket="bucket", Prefix=f"models/{model}/").get("Contents", [])
    client.close()
    return {entry["Key"].removeprefix(f"models/{model}/") for entry in found}


def test_remove_takes_the_model_and_nothing_else(
    endpoint: str, url: str, model: str, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    from rdmaload.cli import main

    rdmaload.save(tiny_checkpoint.directory, url)
    put(endpoint, f"models/{model}/notes.md", b"of somebody else")
    put(endpoint, f"models/{model}/.rdmaload/saving/{'0' * 32}", b"left by a save")
    put(endpoint, f"models/{model}-2/config.json", b"{}")
    files = len(list(tiny_checkpoint.directory.iterdir()))
    assert rdmaload.remove(url) == files + 3  # manifest, index, note
    assert keys_of(endpoint, model) == {"notes.md"}
    assert keys_of(endpoint, f"{model}-2") == {"config.json"}
    with pytest.raises(NotSupportedError, match="no manifest"):
        rdmaload.remove(url)
    with pytest.raises(NotFoundError):
        rdmaload.remove(f"{s3_url(endpoint, 'bucket', 'models/' + model + '-3')}")
    rdmaload.save(tiny_checkpoint.directory, url)
    assert main(["rm", "--yes", url]) == 0
    assert keys_of(endpoint, model) == {"notes.md"}
    capsys.readouterr()


def test_prune_takes_what_saves_left(
    endpoint: str, url: str, model: str, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rdmaload.save(tiny_checkpoint.directory, url)
    published = set(kept(endpoint, model))
    root = f"models/{model}/.rdmaload"
    left = {f"{root}/{'1' * 32}/index", f"{root}/saving/{'2' * 32}", f"{root}/parts/{'3' * 32}/0"}
    for key in left:
        put(endpoint, key, b"left")
    put(endpoint, f"{root}/something-newer", b"?")
    client = boto_client(endpoint)
    client.create_multipart_upload(Bucket="bucket", Key=f"models/{model}/model.safetensors")
    stats = rdmaload.prune(url)
    # All of it is young but the upload, whose beginning moto puts in the year 2010.
    assert (stats.generations, stats.saves, stats.keys, stats.waiting) == (0, 1, 0, 1)
    assert not client.list_multipart_uploads(Bucket="bucket", Prefix=f"models/{model}/").get("Uploads")
    client.close()
    stats = rdmaload.prune(url, force=True)
    assert (stats.generations, stats.saves, stats.keys) == (1, 0, 1)  # a save may still be alive
    now = time.time()
    monkeypatch.setattr("rdmaload.object_removal.time.time", lambda: now + 7200)
    stats = rdmaload.prune(url)
    assert (stats.generations, stats.saves, stats.keys) == (0, 2, 2)  # a note, a part
    assert set(kept(endpoint, model)) == published | {f"{root}/something-newer"}
    assert_loaded(rdmaload.load(url, verify="require"), tiny_checkpoint)


def test_a_copy_out_of_a_bucket_is_verified_where_the_manifest_has_checksums(
    redis_server: RedisServer, endpoint: str, url: str, model: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    rdmaload.save(tiny_checkpoint.directory, url, chunk_bytes=300_000)
    target = redis_server.url(model)
    copied = rdmaload.save(url, target, chunk_bytes=70_000)
    assert_loaded(rdmaload.load(target, verify="require"), tiny_checkpoint)
    assert copied.bytes == sum(path.stat().st_size for path in tiny_checkpoint.directory.iterdir())
    rdmaload.save(url, tmp_path / "copy")
    for path in tiny_checkpoint.directory.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    weights = sorted(tiny_checkpoint.directory.glob("*.safetensors"))[1]
    content = weights.read_bytes()

    def flipped(request: Request, honest: Reply) -> Reply:
        if request.path.endswith(weights.name) and honest.status == 206:
            honest.body = honest.body[:-1] + bytes([honest.body[-1] ^ 1])
        return honest

    client = boto_client(endpoint)
    objects = {
        f"/bucket/m/{key}": client.get_object(Bucket="bucket", Key=f"models/{model}/{key}")["Body"].read()
        for key in keys_of(endpoint, model)
    }
    client.close()
    assert content in objects.values()
    with HttpObjects(objects, flipped) as server:
        for where in (redis_server.url(f"{model}-bad"), str(tmp_path / "bad")):
            with pytest.raises(IntegrityError, match="does not match its checksum"):
                rdmaload.save(bent_url(server), where)
        with pytest.raises(NotFoundError):
            rdmaload.open(redis_server.url(f"{model}-bad"))


def test_a_file_that_was_replaced_is_an_error_before_and_while_it_is_read(
    endpoint: str, url: str, model: str, tiny_checkpoint: Checkpoint
) -> None:
    weights = sorted(tiny_checkpoint.directory.glob("*.safetensors"))[0]
    for save in (rdmaload.save, None):
        if save is None:
            upload(endpoint, model, tiny_checkpoint)
            client = boto_client(endpoint)
            client.delete_object(Bucket="bucket", Key=f"models/{model}/.rdmaload/manifest")
            client.close()
        else:
            save(tiny_checkpoint.directory, url)
        with rdmaload.open(url) as opened:
            changed = bytearray(weights.read_bytes())
            changed[-1] ^= 1
            put(endpoint, f"models/{model}/{weights.name}", bytes(changed))
            with pytest.raises(IntegrityError, match="replaced") as caught:
                opened.load()
            assert caught.value.key == weights.name
        put(endpoint, f"models/{model}/{weights.name}", weights.read_bytes())


def test_flipped_bits_are_found_by_the_checksums(
    tiny_checkpoint: Checkpoint, endpoint: str, url: str, model: str
) -> None:
    rdmaload.save(tiny_checkpoint.directory, url)
    client = boto_client(endpoint)
    objects = {}
    for entry in client.list_objects_v2(Bucket="bucket", Prefix=f"models/{model}/")["Contents"]:
        objects["/bucket/" + entry["Key"]] = client.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read()
    client.close()
    wrong = 0

    def flips(request: Request, honest: Reply) -> Reply:
        nonlocal wrong
        if honest.status == 206 and wrong < limit:
            wrong += 1
            honest.body = honest.body[:-1] + bytes([honest.body[-1] ^ 1])
        return honest

    with HttpObjects(objects, flips) as server:
        bent = s3_url(server.endpoint, "bucket", f"models/{model}", addressing_style="path")
        limit = 2
        stats = LoadStats()
        assert_loaded(rdmaload.load(bent, stats=stats), tiny_checkpoint)
        assert stats.retries == 2
        limit = 10**9
        with pytest.raises(IntegrityError, match="CRC32C"):
            rdmaload.load(bent)


def test_keys_with_spaces_and_unicode_and_1500_of_them(endpoint: str, url: str, model: str, tmp_path: Path) -> None:
    names = [f"files/nr {number}.txt" for number in range(1500)] + [
        "ä ö/日本 +&?#%=.json",
        "plus+plus.bin",
        "a'b(c)!*.x",
    ]
    client = boto_client(endpoint)
    for name in names:
        client.put_object(Bucket="bucket", Key=f"models/{model}/{name}", Body=name.encode())
    client.put_object(Bucket="bucket", Key=f"models/{model}/folder/", Body=b"")
    client.put_object(Bucket="bucket", Key=f"models/{model}-other/x", Body=b"")
    client.put_object(Bucket="bucket", Key=f"models/{model}/.git/config", Body=b"")
    client.close()
    with connector_for(url) as connector:
        assert isinstance(connector, S3Connector)
        assert [info.path for info in connector.list_files()] == sorted(names)
    pulled = rdmaload.pull_files(url, tmp_path / "pulled", allow_pattern=["*.json", "plus*", "a'*", "files/nr 149*"])
    found = {str(path.relative_to(pulled)): path.read_text() for path in pulled.rglob("*") if path.is_file()}
    assert found == {name: name for name in names if name.startswith("files/nr 149") or "files" not in name}


def test_what_is_not_there(endpoint: str, url: str) -> None:
    with pytest.raises(NotFoundError, match="check bucket and prefix"):
        rdmaload.open(url)
    with pytest.raises(NotFoundError, match="NoSuchBucket"):
        rdmaload.open(s3_url(endpoint, "no-such-bucket", "m"))


def test_options_that_make_no_sense_are_refused(endpoint: str) -> None:
    for text in ("s3:///m", "s3://b/m?username=x", "s3://b/m?addressing_style=sideways", "s3://b/m?unsigned=perhaps"):
        with pytest.raises(UrlError):
            connector_for(text)
    with pytest.raises(UrlError, match="ca_file"):
        connector_for("s3://b/m?endpoint_url=http://127.0.0.1&ca_file=/x")
    with pytest.raises(UrlError, match="endpoint"):
        rdmaload.open("s3://b/m?endpoint_url=nonsense", username="a", password="b")
    with pytest.raises(AuthenticationError, match="profile"):
        rdmaload.open("s3://b/m?profile=nobody")


def test_without_credentials_it_says_how_to_get_them() -> None:
    with HttpObjects({}) as server:
        with pytest.raises(AuthenticationError, match="credentials"):
            rdmaload.open(f"s3://bucket/m?endpoint_url={server.endpoint}&region=us-east-1")
        assert server.requests == []


@pytest.mark.parametrize(
    ("status", "code", "error", "exit_code"),
    [
        (403, "InvalidAccessKeyId", AuthenticationError, 5),
        (403, "SignatureDoesNotMatch", AuthenticationError, 5),
        (400, "ExpiredToken", AuthenticationError, 5),
        (403, "AccountProblem", AuthenticationError, 5),
        (403, "InvalidObjectState", NotSupportedError, 8),
        (404, "NoSuchBucket", NotFoundError, 3),
        (429, "TooManyRequests", UnavailableError, 6),
        (429, "SomethingOfAnotherVendor", UnavailableError, 6),
        (503, "SlowDown", UnavailableError, 6),
    ],
)
def test_refusals_are_told_apart_and_end_within_retry_timeout(
    status: int, code: str, error: type, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from rdmaload.cli import main

    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    with HttpObjects({"/bucket/m/config.json": b"{}"}, lambda request, honest: Reply(status, {}, body)) as server:
        with pytest.raises(error, match=code) as caught:
            rdmaload.open(bent_url(server), retry_timeout=0.2)
        # What cannot help is not tried again, and no client under us tries for longer.
        assert len(server.requests) <= (11 if error is UnavailableError else 2)
        assert main(["info", f"{bent_url(server)}&retry_timeout=0.2"]) == exit_code
    assert "secret" not in str(caught.value) + "".join(capsys.readouterr())


def test_a_small_call_goes_on_when_the_store_comes_back(tiny_checkpoint: Checkpoint) -> None:
    left = 7  # more than any client under us would try

    def busy(request: Request, honest: Reply) -> Reply:
        nonlocal left
        if "list-type" not in request.query or left == 0:
            return honest
        left -= 1
        return Reply(503, {}, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>")

    with HttpObjects(objects_of(tiny_checkpoint), busy) as server:
        assert_loaded(rdmaload.load(bent_url(server), retry_timeout=60, connect_timeout=60), tiny_checkpoint)
    assert left == 0


def test_what_was_removed_counts_as_removed_though_the_first_answer_was_lost() -> None:
    removals = 0

    def loses(request: Request, honest: Reply) -> Reply:
        nonlocal removals
        if request.method != "DELETE":
            return honest
        removals += 1
        server.objects.pop(request.path, None)
        return Reply(503) if removals == 1 else Reply(204)

    with HttpObjects({"/bucket/m/config.json": b"{}"}, loses) as server, connector_for(bent_url(server)) as connector:
        assert isinstance(connector, S3Connector)
        assert connector.delete("config.json") is True
        assert removals == 2
        assert server.objects == {}
        assert connector.delete("config.json") is False
        assert removals == 2


def test_small_calls_that_are_sent_again_are_counted() -> None:
    left = 3

    def busy(request: Request, honest: Reply) -> Reply:
        nonlocal left
        if left == 0:
            return Reply(200, {"ETag": '"x"'})
        left -= 1
        return Reply(503, {}, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>")

    with HttpObjects({}, busy) as server, connector_for(bent_url(server)) as connector:
        assert isinstance(connector, S3Connector)
        connector.put("config.json", b"{}")
        assert connector.retries == 3  # which SaveStats.retries is
        assert len(server.requests) == 4
        connector.put("config.json", b"{}")
        assert connector.retries == 3


def test_keys_of_the_environment_and_of_profiles_are_used_and_the_environment_stays(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "credentials"
    shared.write_text("[other]\naws_access_key_id = FROMPROFILE\naws_secret_access_key = hush\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(shared))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FROMENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token")
    before = dict(os.environ)
    for given, key in (("", "FROMENVIRONMENT"), ("&profile=other", "FROMPROFILE")):
        with HttpObjects(objects_of(tiny_checkpoint)) as server:
            place = f"endpoint_url={server.endpoint}&addressing_style=path&region=us-east-1"
            with rdmaload.open(f"s3://bucket/m?{place}{given}") as opened:
                assert_loaded(opened.load(), tiny_checkpoint)
                assert "hush" not in repr(opened)
        weights = [request for request in server.requests if "X-Amz-Credential" in request.query]
        small = [request for request in server.requests if "authorization" in request.headers]
        assert weights
        assert small
        assert all(request.query["X-Amz-Credential"].startswith(f"{key}/") for request in weights)
        assert all(f"Credential={key}/" in request.headers["authorization"] for request in small)
        assert all(("X-Amz-Security-Token" in request.query) == (given == "") for request in weights)
    assert dict(os.environ) == before


def test_a_secret_in_the_endpoint_is_refused_and_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    for endpoint in ("http://user:hushhush@127.0.0.1:9", "http://127.0.0.1:9/?sig=hushhush"):
        for url, options in (
            (f"s3://b/m?endpoint_url={quote(endpoint, safe='')}", {}),
            ("s3://b/m", {"endpoint_url": endpoint}),
        ):
            with pytest.raises(UrlError, match="endpoint_url") as caught:
                rdmaload.open(url, **options)
            assert "hushhush" not in f"{caught.value} {caught.value.url} {caplog.text}"


OTHER_PROXIES = {
    "socks5://user:hushhush@127.0.0.1:9": (NotSupportedError, r"socks5://127\.0\.0\.1:9.*http:// proxies"),
    "https://user:hushhush@127.0.0.1:9": (NotSupportedError, r"https://127\.0\.0\.1:9.*http:// proxies"),
    "ftp://user:hushhush@127.0.0.1:9": (NotSupportedError, r"ftp://127\.0\.0\.1:9.*http:// proxies"),
    "http://user:hushhush/x@y@127.0.0.1:9": (UrlError, "percent-encoded"),
    "http://user:hush#hush@127.0.0.1:9": (UrlError, "percent-encoded"),
    "http://user:hushhush@[::1": (UrlError, "percent-encoded"),
    "http://user:9/hushhush@127.0.0.1:9": (UrlError, "percent-encoded"),
    "http://:9": (UrlError, "percent-encoded"),
}


@pytest.mark.parametrize("proxy", OTHER_PROXIES)
@pytest.mark.parametrize(
    "url", ["http://models.example/m", "s3://b/m?region=us-east-1&username=a&password=b", "s3://b/m?unsigned=true"]
)
def test_proxies_of_other_kinds_are_refused_by_name(url: str, proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, words = OTHER_PROXIES[proxy]
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(error, match=words) as caught:
        rdmaload.open(url)
    assert "hush" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HttpObjects({"/bucket/m/config.json": b"{}"}) as server:
        rdmaload.open(bent_url(server)).close()


def test_a_proxy_may_be_written_without_its_scheme() -> None:
    for proxy in ("u:p%40@proxy:3128", "//u:p%40@proxy:3128", "http://u:p%40@proxy:3128/"):
        assert split_proxy(proxy) == ("http://proxy:3128", "Basic dTpwQA==")


def test_a_public_bucket_needs_none(tiny_checkpoint: Checkpoint) -> None:
    with HttpObjects(objects_of(tiny_checkpoint)) as server:
        url = f"s3://bucket/m?endpoint_url={server.endpoint}&unsigned=true&addressing_style=path&region=us-east-1"
        assert_loaded(rdmaload.load(url), tiny_checkpoint)
        assert not [request for request in server.requests if "Signature" in request.target]
        assert not [request for request in server.requests if "authorization" in request.headers]


def bent_url(server: HttpObjects, **options: object) -> str:
    return s3_url(server.endpoint, "bucket", "m", addressing_style="path", **options)


def test_a_storm_of_503_and_resets_ends_byte_equal(tiny_checkpoint: Checkpoint) -> None:
    dice = random.Random(7)

    def storm(request: Request, honest: Reply) -> Reply:
        if honest.status != 206 or request.headers.get("user-agent") != "rdmaload":
            return honest
        throw = dice.random()
        if throw < 0.2:
            return Reply(503, {}, b"<Error><Code>SlowDown</Code></Error>", then=dice.choice(["go on", "close"]))
        if throw < 0.5:
            honest.cut = dice.randrange(len(honest.body))
            honest.then = dice.choice(["close", "reset"])
        return honest

    with HttpObjects(objects_of(tiny_checkpoint), storm) as server:
        for connections in (1, 4):
            stats = LoadStats()
            assert_loaded(rdmaload.load(bent_url(server, connections=connections), stats=stats), tiny_checkpoint)
        assert stats.retries >= 1
        # Bytes that arrived were not asked for again.
        starts = [request.range[0] for request in server.requests if request.range and request.range[0] > 8]
        assert len(starts) > 2 * 3


def test_a_stalled_connection_is_replaced(tiny_checkpoint: Checkpoint) -> None:
    stalled = 0

    def stalls(request: Request, honest: Reply) -> Reply:
        nonlocal stalled
        if honest.status == 206 and request.headers.get("user-agent") == "rdmaload" and stalled < 2:
            stalled += 1
            honest.cut, honest.then = len(honest.body) // 2, "stall"
        return honest

    with HttpObjects(objects_of(tiny_checkpoint), stalls) as server:
        stats = LoadStats()
        assert_loaded(rdmaload.load(bent_url(server, stall_timeout=0.05), stats=stats), tiny_checkpoint)
        assert stats.retries >= 2


def test_a_store_that_never_answers_ends_in_time(tiny_checkpoint: Checkpoint) -> None:
    def stalls(request: Request, honest: Reply) -> Reply:
        if request.headers.get("user-agent") == "rdmaload":
            honest.cut, honest.then = 0, "stall"
        return honest

    with HttpObjects(objects_of(tiny_checkpoint), stalls) as server:
        url = bent_url(server, stall_timeout=0.05, inactivity_timeout=0.2, retry_timeout=0.3)
        with pytest.raises(LoadTimeoutError, match="inactivity_timeout") as caught:
            rdmaload.load(url)
        assert "Signature" not in str(caught.value)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("lie", "error", "words"),
    [
        (lambda reply: Reply(200, {}, b"x" * 100), NotSupportedError, "does not support ranges"),
        (lambda reply: Reply(206, {"Content-Range": "bytes 0-9/10"}, b"x" * 10), IntegrityError, "replaced"),
        (lambda reply: Reply(206, {}, reply.body), None, "without saying which bytes"),
        (lambda reply: Reply(206, {**reply.headers, "ETag": '"other"'}, reply.body), IntegrityError, "replaced"),
        (
            lambda reply: Reply(403, {}, b"<Error><Code>AccessDenied</Code></Error>"),
            AuthenticationError,
            "AccessDenied",
        ),
        (lambda reply: Reply(302, {"Location": "https://elsewhere.invalid/x?sig=hush"}), None, "elsewhere"),
    ],
)
def test_lies_are_refused_by_name(tiny_checkpoint: Checkpoint, lie: object, error: type | None, words: str) -> None:
    def lies(request: Request, honest: Reply) -> Reply:
        native = honest.status == 206 and request.headers.get("user-agent") == "rdmaload"
        return lie(honest) if native else honest  # type: ignore[operator]

    with (
        HttpObjects(objects_of(tiny_checkpoint), lies) as server,
        pytest.raises(error or rdmaload.RdmaloadError, match=words) as caught,
    ):
        rdmaload.load(bent_url(server, retry_timeout=0.2))
    assert caught.value.key is not None
    assert "hush" not in str(caught.value)
    assert "Signature" not in str(caught.value)


@pytest.mark.parametrize(
    ("lie", "error", "words"),
    [
        (
            lambda honest, all_of_it: Reply(200, {"ETag": honest.headers["ETag"]}, all_of_it),
            NotSupportedError,
            "ranges",
        ),
        (
            lambda honest, all_of_it: Reply(
                206, honest.headers | {"Content-Range": f"bytes 5-{4 + len(honest.body)}/{len(all_of_it)}"}, honest.body
            ),
            FormatError,
            "asked for bytes",
        ),
        (
            lambda honest, all_of_it: Reply(206, honest.headers | {"ETag": '"other"'}, honest.body),
            IntegrityError,
            "replaced",
        ),
    ],
)
def test_lies_are_refused_where_a_copy_reads_by_boto(tmp_path: Path, lie: object, error: type, words: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", {"w": ("U8", [20 << 20])})  # longer than what is read at once
    objects = objects_of(checkpoint)

    def lies(request: Request, honest: Reply) -> Reply:
        if "if-match" not in request.headers:  # what opening the model asks is answered well
            return honest
        return lie(honest, objects[request.path])  # type: ignore[operator]

    with HttpObjects(objects, lies) as server, pytest.raises(error, match=words) as caught:
        rdmaload.save(bent_url(server, retry_timeout=0.2), tmp_path / "copy")
    assert caught.value.key is not None


def test_a_url_that_expired_on_the_way_is_signed_anew(tiny_checkpoint: Checkpoint) -> None:
    seen: set[str] = set()

    def expires(request: Request, honest: Reply) -> Reply:
        if request.headers.get("user-agent") != "rdmaload" or request.path in seen:
            return honest
        seen.add(request.path)
        message = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
        return Reply(403, {}, message)

    with HttpObjects(objects_of(tiny_checkpoint), expires) as server:
        stats = LoadStats()
        assert_loaded(rdmaload.load(bent_url(server), stats=stats), tiny_checkpoint)
        assert seen
        assert stats.retries == 0


def test_a_proxy_of_the_environment_is_used(tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_proxy(request: Request, honest: Reply) -> Reply:
        assert request.target.startswith("http://store.invalid/")
        return server.honest(
            Request(request.method, request.target.removeprefix("http://store.invalid"), request.headers, 0)
        )

    with HttpObjects(objects_of(tiny_checkpoint), as_proxy) as server:
        monkeypatch.setenv("HTTP_PROXY", server.endpoint)
        monkeypatch.setenv("http_proxy", server.endpoint)
        url = s3_url("http://store.invalid", "bucket", "m", addressing_style="path")
        assert_loaded(rdmaload.load(url), tiny_checkpoint)
        assert [request for request in server.requests if request.headers.get("user-agent") == "rdmaload"]


def test_tls_reaches_through_a_proxy_to_the_store(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> None:
    certificate = authority.issue(names=("store.invalid",))
    with (
        HttpObjects(objects_of(tiny_checkpoint), tls=certificate) as server,
        ConnectProxy(server.endpoint.rpartition(":")[2]) as proxy,
    ):
        address = proxy.url.replace("http://", "http://user:s3cr3t@")
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, address)
        url = s3_url("https://store.invalid", "bucket", "m", addressing_style="path", ca_file=str(authority.ca_file))
        stats = LoadStats()
        assert_loaded(rdmaload.load(url, stats=stats), tiny_checkpoint)
        assert stats.retries == 0
        assert [request for request in server.requests if request.headers.get("user-agent") == "rdmaload"]
        assert all("proxy-authorization" not in request.headers for request in server.requests)
    asked = set(proxy.requests)
    lines = {line for line, _ in asked}  # boto3 asks in HTTP/1.0
    assert "CONNECT store.invalid:443 HTTP/1.1" in lines
    assert all(line.startswith("CONNECT store.invalid:443 ") for line in lines)
    assert {authorization for _, authorization in asked} == {"Basic " + base64.b64encode(b"user:s3cr3t").decode()}


@pytest.mark.slow
def test_hundreds_of_megabytes_through_a_storm_arrive_byte_equal(tmp_path: Path) -> None:
    """503 for a fifth of the requests, and a connection that resets in the middle of one in ten bodies."""
    checkpoint = llama_like(tmp_path / "large", 4e8)
    chance, mutex = random.Random(5), threading.Lock()
    counts = {"slow": 0, "reset": 0, "asked": 0}

    def storm(request: Request, honest: Reply) -> Reply:
        if request.headers.get("user-agent") != "rdmaload":  # boto3's own pauses are seconds long
            return honest
        with mutex:
            dice, cut = chance.random(), chance.random()
            counts["asked"] += 1
            counts["slow"] += dice < 0.2
            counts["reset"] += 0.2 <= dice < 0.3
        if dice < 0.2:
            return Reply(503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>")
        if dice < 0.3:
            honest.cut, honest.then = int(len(honest.body) * cut), "reset"
        return honest

    with HttpObjects(objects_of(checkpoint), storm) as server:
        stats = LoadStats()
        state = rdmaload.load(bent_url(server), stats=stats)
    assert compare(state, checkpoint.directory) == checkpoint.bytes
    assert counts["asked"] > 50
    assert min(counts["slow"], counts["reset"]) > 0
    assert stats.retries >= counts["slow"]


def test_the_command_line_knows_s3(url: str, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    from rdmaload.cli import main

    assert main(["save", str(tiny_checkpoint.directory), url]) == 0
    assert main(["ls", url]) == 0
    assert main(["ls", url.replace("/models/", "/no-models/")]) == 3
    assert main(["ls", url.replace("s3://bucket/", "s3://no-bucket/")]) == 3
    assert "config.json" in capsys.readouterr().out
    assert main(["info", url]) == 0
    assert main(["verify", url]) == 0
    assert "secret" not in "".join(capsys.readouterr())
