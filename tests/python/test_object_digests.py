"""The CRCs that object stores keep of whole objects, where a model has no manifest; and manifests that vouch."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import rdmaload
from rdmaload import _core
from rdmaload.connectors.store_digests import DIGEST_KINDS, FileDigest, digest_of_headers, digest_of_text
from rdmaload.digests import WholeFiles
from rdmaload.errors import IntegrityError, PartialLoadError
from rdmaload.index import IndexFile
from rdmaload.stats import LoadStats
from tests.support.checkpoints import Checkpoint, compare
from tests.support.s3 import HttpObjects, Reply, Request, boto_client, moto_s3, s3_url
from tests.support.web import apache_pages

KINDS = list(DIGEST_KINDS)


@pytest.fixture(scope="module", autouse=True)
def clean_environment() -> Iterator[None]:
    import os

    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_") or name.lower().endswith("_proxy"):
                patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


def text_of(kind: str, data: bytes) -> str:
    return base64.b64encode(_core.crc(kind, data).to_bytes(DIGEST_KINDS[kind], "big")).decode()


class Store(HttpObjects):
    """S3 that has a CRC of every object; sends a wrong bit of `wrong`, and cuts the first body of each connection."""

    def __init__(self, checkpoint: Checkpoint, kind: str, type_of: str = "FULL_OBJECT") -> None:
        self.kind, self.type, self.wrong, self.without, self.resets = kind, type_of, "", "", 0
        objects = {f"/bucket/m/{path.name}": path.read_bytes() for path in checkpoint.directory.iterdir()}
        super().__init__(objects, self._bent)

    def _bent(self, request: Request, honest: Reply) -> Reply:
        asked = request.headers.get("x-amz-checksum-mode") == "ENABLED"
        if request.method == "HEAD" and asked and not request.path.endswith(self.without or "nothing"):
            text = text_of(self.kind, self.objects[request.path])
            honest.headers[f"x-amz-checksum-{self.kind}"] = text if self.type == "FULL_OBJECT" else f"{text}-3"
            honest.headers["x-amz-checksum-type"] = self.type
        long = request.method == "GET" and len(honest.body) > 100_000
        if long and request.path.endswith(self.wrong or "nothing"):
            body = bytearray(honest.body)
            body[len(body) // 2] ^= 4
            honest.body = bytes(body)
        if long and self.resets > 0:
            self.resets -= 1
            honest.cut, honest.then = len(honest.body) // 3, "reset"
        return honest

    @property
    def url(self) -> str:
        return s3_url(self.endpoint, "bucket", "m")


def first_weights(checkpoint: Checkpoint) -> str:
    return sorted(path.name for path in checkpoint.directory.glob("*.safetensors"))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_verified_by_the_crc_of_the_store(kind: str, tiny_checkpoint: Checkpoint) -> None:
    with Store(tiny_checkpoint, kind) as store:
        store.resets = 2  # what came before goes on being counted
        stats = LoadStats()
        state = rdmaload.load(store.url, verify="require", stats=stats)
        assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert stats.verified_bytes == stats.read_bytes > 0
        assert (stats.unverified_bytes, store.resets) == (0, 0)
        stats = LoadStats()
        state = dict(rdmaload.weight_iterator(store.url, window_bytes=400_000, stats=stats))
        assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert (stats.verified_bytes, stats.unverified_bytes) == (stats.read_bytes, 0)
        target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        stats = rdmaload.load_into(target, store.url, verify="require")
        assert compare(target, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert stats.unverified_bytes == 0
        with rdmaload.open(store.url) as model:  # plain files as well
            assert model.verify().unverified_bytes == 0
        stats = LoadStats()
        rdmaload.load(store.url, verify="off", stats=stats)
        assert stats.verified_bytes == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found(kind: str, tiny_checkpoint: Checkpoint) -> None:
    with Store(tiny_checkpoint, kind) as store:
        store.wrong = first_weights(tiny_checkpoint)
        with pytest.raises(IntegrityError, match=f"{store.wrong}.*{kind.upper()}") as caught:
            rdmaload.load(store.url)
        assert caught.value.key == store.wrong
        with pytest.raises(IntegrityError, match=kind.upper()):
            for _ in rdmaload.weight_iterator(store.url, window_bytes=400_000):
                pass
        rdmaload.load(store.url, verify="off")


def test_a_file_that_is_wrong_counts_as_not_loaded(tiny_checkpoint: Checkpoint) -> None:
    with Store(tiny_checkpoint, "crc64nvme") as store:
        target = rdmaload.load(store.url)
        store.wrong = first_weights(tiny_checkpoint)
        with rdmaload.open(store.url) as model:
            files = {name: spec.file for name, spec in model.tensors.items()}
        with pytest.raises(PartialLoadError, match="CRC64NVME") as caught:
            rdmaload.load_into(target, store.url)
        assert not [name for name in caught.value.loaded if files[name] == store.wrong]


def test_parts_of_files_are_unverified_or_refused(tiny_checkpoint: Checkpoint) -> None:
    with Store(tiny_checkpoint, "crc32") as store:
        with rdmaload.open(store.url) as model:
            some = next(iter(model.tensors))
        stats = LoadStats()
        rdmaload.load(store.url, include=some, stats=stats)
        assert (stats.verified_bytes, stats.unverified_bytes) == (0, stats.read_bytes)
        with pytest.raises(IntegrityError, match="only a part of it is selected"):
            rdmaload.load(store.url, include=some, verify="require")


def test_a_target_that_is_filled_in_two_ways_is_verified_all_the_same(tiny_checkpoint: Checkpoint) -> None:
    with Store(tiny_checkpoint, "crc32c") as store:
        target = {}
        for number, (name, tensor) in enumerate(sorted(rdmaload.load(store.url).items())):
            # Every third is not contiguous: it is filled through a buffer, by other reads than its neighbours.
            wide = torch.empty((*tensor.shape, 2), dtype=tensor.dtype)[..., 0]
            target[name] = torch.empty_like(tensor) if number % 3 else wide
        stats = rdmaload.load_into(target, store.url, verify="require")
        assert compare(target, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert (stats.verified_bytes, stats.unverified_bytes) == (stats.read_bytes, 0)


def test_pulled_files_need_a_checksum_each_where_it_is_required(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with Store(tiny_checkpoint, "crc32") as store:
        rdmaload.pull_files(store.url, tmp_path, allow_pattern="*", verify="require")
        for path in tiny_checkpoint.directory.iterdir():
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()
        store.without = "config.json"
        with pytest.raises(IntegrityError, match="the store has no checksum of it"):
            rdmaload.pull_files(store.url, tmp_path, verify="require")


def test_checksums_of_parts_are_not_those_of_the_bytes(tiny_checkpoint: Checkpoint) -> None:
    with Store(tiny_checkpoint, "crc32c", "COMPOSITE") as store:
        stats = LoadStats()
        rdmaload.load(store.url, stats=stats)
        assert (stats.verified_bytes, stats.unverified_bytes) == (0, stats.read_bytes)
        with pytest.raises(IntegrityError, match="no checksums"):
            rdmaload.load(store.url, verify="require")


def test_what_boto_uploads_is_verified_by_its_crc32(tiny_checkpoint: Checkpoint) -> None:
    with moto_s3("bucket") as endpoint:
        client = boto_client(endpoint)
        for path in tiny_checkpoint.directory.iterdir():
            client.put_object(Bucket="bucket", Key=f"m/{path.name}", Body=path.read_bytes(), ChecksumAlgorithm="CRC32")
        client.close()
        stats = LoadStats()
        state = rdmaload.load(s3_url(endpoint, "bucket", "m"), verify="require", stats=stats)
        assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert (stats.verified_bytes, stats.unverified_bytes) == (stats.read_bytes, 0)


def test_a_server_that_names_a_crc_over_http_is_believed(tiny_checkpoint: Checkpoint) -> None:
    objects = {f"/m/{path.name}": path.read_bytes() for path in tiny_checkpoint.directory.iterdir()}
    wrong: list[str] = []
    pages = apache_pages(objects)

    def bent(request: Request, honest: Reply) -> Reply:
        if request.path in objects:
            honest.headers["x-goog-hash"] = f"md5=AAAA, crc32c={text_of('crc32c', objects[request.path])}"
        if request.path in wrong and len(honest.body) > 1000:
            honest.body = honest.body[:-1] + bytes([honest.body[-1] ^ 1])
        return pages(request, honest)

    with HttpObjects(objects, bent) as server:
        url = f"{server.endpoint}/m"
        stats = LoadStats()
        assert compare(rdmaload.load(url, verify="require", stats=stats), tiny_checkpoint.directory)
        assert (stats.verified_bytes, stats.unverified_bytes) == (stats.read_bytes, 0)
        wrong.append(f"/m/{first_weights(tiny_checkpoint)}")
        with pytest.raises(IntegrityError, match="CRC32C"):
            rdmaload.load(url)


def test_what_is_no_checksum_of_the_bytes_is_left_alone() -> None:
    assert digest_of_text("crc32c", "AAAAAQ==") == FileDigest("crc32c", 1)
    assert digest_of_text("crc64nvme", "AAAAAAAAAAE=") == FileDigest("crc64nvme", 1)
    for text in ("", "AAAAAQ==-3", "AAAAAAAAAAE=", "no base64!", "A"):
        assert digest_of_text("crc32", text) is None
    headers = {"x-goog-hash": "md5=1B2M2Y8AsgTpgAmY7PhCfg=="}
    assert digest_of_headers(lambda name: headers.get(name, "")) is None
    headers = {"x-amz-checksum-crc32": "AAAAAQ==", "x-amz-checksum-type": "FULL_OBJECT"}
    assert digest_of_headers(lambda name: headers.get(name, "")) == FileDigest("crc32", 1)
    headers["x-amz-checksum-type"] = "COMPOSITE"
    assert digest_of_headers(lambda name: headers.get(name, "")) is None


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_count_in_any_order_from_any_thread(kind: str) -> None:
    header, data = b"{}", bytes(range(256)) * 40
    content = len(header).to_bytes(8, "little") + header + data
    stored = IndexFile("w.safetensors", len(content), header=header)
    pieces = [(0, at, 100, _core.crc(kind, content[at : at + 100])) for at in range(10, len(content) - 100, 100)]
    end = pieces[-1][1] + 100
    pieces.append((0, end, len(content) - end, _core.crc(kind, content[end:])))
    digest = FileDigest(kind, _core.crc(kind, content))
    for order in (pieces, pieces[::-1]):
        whole = WholeFiles("s3://b/m", [stored], {0: digest})
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(whole.add, [[piece] for piece in order])) == len(data)
    whole = WholeFiles("s3://b/m", [stored], {0: digest})
    others = [crc for *_, crc in [*pieces[1:], pieces[0]]]
    swapped = [(file, at, size, crc) for (file, at, size, _), crc in zip(pieces, others, strict=True)]
    with pytest.raises(IntegrityError, match="upload it again"):
        whole.add(swapped)
    holes = [(0, at + 1, size, crc) for _, at, size, crc in pieces]
    with pytest.raises(IntegrityError, match="do not fit together"):
        WholeFiles("s3://b/m", [stored], {0: digest}, must=True).add([*pieces[:1], *holes])
    # What came twice, or with holes, is unverified and no error: another read may have been meant for it.
    assert WholeFiles("s3://b/m", [stored], {0: digest}).add([*pieces[:-1], pieces[3], pieces[4]]) == 0
    whole = WholeFiles("s3://b/m", [stored], {0: digest})
    front = (0, 0, 10, _core.crc(kind, content[:10]))
    assert whole.add([*pieces[1:], front]) == 0  # the header was read again, and something is missing
    assert whole.add(pieces[:1]) == len(content)


def test_a_model_that_was_copied_to_another_bucket_is_vouched_for_by_its_manifest(tiny_checkpoint: Checkpoint) -> None:
    with moto_s3("from", "copies") as endpoint:
        source, url = s3_url(endpoint, "from", "m"), s3_url(endpoint, "copies", "m")
        rdmaload.save(tiny_checkpoint.directory, source, chunk_bytes=100_000)
        client = boto_client(endpoint)
        name = first_weights(tiny_checkpoint)
        content = (tiny_checkpoint.directory / name).read_bytes()

        def put_in_parts(data: bytes) -> None:
            place = {"Bucket": "copies", "Key": f"m/{name}"}
            upload = client.create_multipart_upload(**place)["UploadId"]
            part = client.upload_part(**place, UploadId=upload, PartNumber=1, Body=data)["ETag"]
            parts = {"Parts": [{"PartNumber": 1, "ETag": part}]}
            client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload=parts)

        for entry in client.list_objects_v2(Bucket="from")["Contents"]:
            client.copy_object(Bucket="copies", Key=entry["Key"], CopySource={"Bucket": "from", "Key": entry["Key"]})
        put_in_parts(content)  # as a tool copies large objects: the same bytes, another ETag
        tags = [client.head_object(Bucket=bucket, Key=f"m/{name}")["ETag"] for bucket in ("from", "copies")]
        assert tags[0] != tags[1]
        stats = LoadStats()
        state = rdmaload.load(url, verify="require", stats=stats)
        assert compare(state, tiny_checkpoint.directory) == tiny_checkpoint.bytes
        assert stats.unverified_bytes == 0
        rdmaload.save(url, s3_url(endpoint, "copies", "again"))
        with pytest.raises(IntegrityError, match="replaced"):  # without checksums only the ETag can say
            rdmaload.load(url, verify="off")
        damaged = bytearray(content)
        damaged[-1] ^= 1
        put_in_parts(bytes(damaged))
        with pytest.raises(IntegrityError, match="CRC32C"):
            rdmaload.load(url)
        put_in_parts(content + b"x")
        with pytest.raises(IntegrityError, match="replaced"):
            rdmaload.load(url)
        client.close()
