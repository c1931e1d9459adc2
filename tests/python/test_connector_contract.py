"""What every connector promises: one suite over all key-value stores and all file stores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_dynamodb_plugin import dynamodb_table  # noqa: F401  (a fixture)

from rdmaload.connectors import FileConnector, KeyValueConnector, connector_for
from rdmaload.connectors.memory import forget_store
from rdmaload.errors import FormatError, NotFoundError, NotSupportedError, UnavailableError
from tests.support.s3 import moto_s3, s3_url

Open = Callable[[], KeyValueConnector]


SERVERS = {
    "redis": "redis_server",
    "redis-resp3": "redis_server",
    "rediss": "tls_server",
    "rediss-resp3": "tls_server",
    "redis+unix": "unix_server",
    "valkeys": "valkey_server",
    "rdmaload-serve": "weight_server",
    "rdmaload-serve-resp3": "weight_server",
}


@pytest.fixture(params=["memory", *SERVERS, "dynamodb"])
def store_url(request: pytest.FixtureRequest, model: str) -> Iterator[str]:
    if request.param == "memory":
        yield f"memory://{model}/{model}"
        forget_store(model)
    elif request.param == "dynamodb":
        yield f"dynamodb://{request.getfixturevalue('dynamodb_table')}/{model}"
    else:
        protocol = 3 if request.param.endswith("-resp3") else 2
        yield request.getfixturevalue(SERVERS[request.param]).url(model, protocol=protocol)


@pytest.fixture
def store(store_url: str) -> Iterator[KeyValueConnector]:
    with connector_for(store_url) as connector:
        assert isinstance(connector, KeyValueConnector)
        yield connector


@pytest.fixture
def k(store: KeyValueConnector) -> Callable[[str], str]:
    """Whole keys of this test's model."""
    return lambda name: f"{store.model}/{name}"


class TestKeyValue:
    @pytest.mark.parametrize("value", [b"", b"\0", b"\r\n$-1\r\n", bytes(range(256)) * 1200])
    def test_a_value_comes_back_byte_equal(self, store: KeyValueConnector, k: Any, value: bytes) -> None:
        assert store.set(k("a"), value) is True
        assert store.get(k("a")) == value
        assert store.exists(k("a")) is True
        buffer = bytearray(b"\xee" * (len(value) + 3))
        assert store.get_into(k("a"), memoryview(buffer)) == len(value)
        assert buffer == value + b"\xee" * 3

    def test_any_buffer_is_stored_as_its_bytes(self, store: KeyValueConnector, k: Any) -> None:
        import array

        for number, buffer in enumerate(
            (
                bytearray(b"abc"),
                memoryview(b"xabcx")[1:4],
                array.array("I", [1, 2**31]),
                memoryview(b""),
            )
        ):
            assert store.set(k(str(number)), buffer)
            assert store.get(k(str(number))) == bytes(buffer)

    def test_the_store_keeps_its_own_copy(self, store: KeyValueConnector, k: Any) -> None:
        value = bytearray(b"before")
        store.set(k("a"), value)
        value[:] = b"after!"
        assert store.get(k("a")) == b"before"

    def test_what_is_not_there(self, store: KeyValueConnector, k: Any) -> None:
        assert store.get(k("none")) is None
        assert store.exists(k("none")) is False
        assert store.delete(k("none")) == 0
        assert store.delete() == 0
        with pytest.raises(NotFoundError) as caught:
            store.get_into(k("none"), memoryview(bytearray(1)))
        assert (caught.value.url, caught.value.key) == (store.url, k("none"))
        assert store.url in str(caught.value)
        assert k("none") in str(caught.value)

    def test_a_value_that_does_not_fit_is_refused_and_nothing_written(self, store: KeyValueConnector, k: Any) -> None:
        store.set(k("a"), b"12345")
        buffer = bytearray(4)
        with pytest.raises(FormatError) as caught:
            store.get_into(k("a"), memoryview(buffer))
        assert caught.value.key == k("a")
        assert buffer == bytes(4)

    def test_set_replaces_and_if_absent_does_not(self, store: KeyValueConnector, k: Any) -> None:
        assert store.set(k("a"), b"1", if_absent=True) is True
        assert store.set(k("a"), b"2", if_absent=True) is False
        assert store.set(k("a"), b"1", if_absent=True) is False
        assert store.get(k("a")) == b"1"
        assert store.set(k("a"), b"3") is True
        assert store.get(k("a")) == b"3"

    def test_one_of_many_claims_wins(self, store: KeyValueConnector, k: Any) -> None:
        if store.url.startswith("dynamodb"):
            pytest.skip("the stand-in for DynamoDB checks conditions without a lock")
        start = threading.Barrier(8)

        def claim(number: int) -> bool:
            start.wait()
            return store.set(k("claim"), b"%d" % number, if_absent=True)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(claim, range(8)))
        assert sum(won) == 1
        assert store.get(k("claim")) == b"%d" % won.index(True)

    def test_list_takes_the_prefix_literally(self, store: KeyValueConnector, k: Any) -> None:
        names = ["a", "ab", "a*", "a*b", "a?", "a[b]", "a\\b", "a^", "x/a", "ä/ö", "a b"]
        for name in names:
            store.set(k(name), b"1")
        for prefix in [
            "",
            "a",
            "a*",
            "a?",
            "a[",
            "a[b]",
            "a\\",
            "a^",
            "ab",
            "x/",
            "x",
            "ä/",
            "a ",
            "none",
        ]:
            expected = sorted(k(name) for name in names if name.startswith(prefix))
            assert sorted(store.list(k(prefix))) == expected, prefix

    def test_list_gives_many_keys_once_each(self, store: KeyValueConnector, k: Any) -> None:
        count = 300 if "dynamodb" in store.url else 5000
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: store.set(k(f"many/{i}"), b"1"), range(count)))
        listed = list(store.list(k("many/")))
        assert sorted(listed) == sorted(k(f"many/{i}") for i in range(count))
        assert store.delete_prefix(k("many/")) == count
        assert list(store.list(k("many/"))) == []

    def test_delete_counts_what_was_there(self, store: KeyValueConnector, k: Any) -> None:
        for name in "abc":
            store.set(k(name), b"1")
        assert store.delete(k("a"), k("b"), k("none")) == 2
        assert sorted(store.list(k(""))) == [k("c")]

    def test_names_in_a_set(self, store: KeyValueConnector, k: Any) -> None:
        for name in ("a", "org/b", "a"):
            store.members_add(k("names"), name)
        assert store.members(k("names")) == {"a", "org/b"}
        store.members_remove(k("names"), "a")
        store.members_remove(k("names"), "none")
        assert store.members(k("names")) == {"org/b"}
        assert store.members(k("other")) == set()

    def test_a_value_above_the_limit_is_refused_by_name(self, store: KeyValueConnector, k: Any) -> None:
        limit = store.max_value_bytes
        with pytest.raises(NotSupportedError, match=str(limit)):
            store.set(k("big"), memoryview(bytearray(limit + 1)))
        assert not store.exists(k("big"))

    def test_a_value_at_the_limit_is_stored(self, store: KeyValueConnector, k: Any) -> None:
        if store.max_value_bytes > 2**20:
            pytest.skip("half a gigabyte is another test's business")
        store.set(k("x" * 200), bytes(store.max_value_bytes))
        assert store.get(k("x" * 200)) == bytes(store.max_value_bytes)

    def test_two_connectors_see_the_same_values(self, store: KeyValueConnector, store_url: str, k: Any) -> None:
        with connector_for(store_url) as other:
            assert isinstance(other, KeyValueConnector)
            store.set(k("a"), b"1")
            assert other.get(k("a")) == b"1"

    def test_threads_share_one_connector(self, store: KeyValueConnector, k: Any) -> None:
        def work(number: int) -> bool:
            value = b"%d" % number * 1000
            store.set(k(f"t/{number}"), value)
            buffer = bytearray(len(value))
            store.get_into(k(f"t/{number}"), memoryview(buffer))
            return buffer == value

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(work, range(100)))

    def test_close_is_idempotent_and_use_after_it_is_one_clear_error(self, store: KeyValueConnector) -> None:
        assert repr(store) == f"<{type(store).__name__} {store.url} open>"
        store.close()
        store.close()
        assert repr(store).endswith("closed>")
        uses: list[Callable[[], object]] = [
            lambda: store.get("a"),
            lambda: store.set("a", b""),
            lambda: store.exists("a"),
            lambda: list(store.list("a")),
            lambda: store.delete("a"),
            lambda: store.get_into("a", memoryview(bytearray(1))),
            lambda: store.members("a"),
            lambda: store.__enter__(),
        ]
        for use in uses:
            with pytest.raises(UnavailableError, match="is closed: open another"):
                use()

    def test_warnings_are_a_list(self, store: KeyValueConnector) -> None:
        assert list(store.publish_warning(10)) == []


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    with moto_s3("bucket") as endpoint:
        yield endpoint


def listed(files: FileConnector) -> list[str]:
    """The paths; none where a store of objects, which has no empty directories, says that there is no model."""
    try:
        return [info.path for info in files.list_files()]
    except NotFoundError:
        assert files.url.startswith("s3://")
        return []


@pytest.fixture(params=["local", "file-url", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path, model: str) -> Iterator[FileConnector]:
    if request.param == "s3":
        url = s3_url(request.getfixturevalue("s3_endpoint"), "bucket", f"a model/{model}")
        with connector_for(url) as connector:
            assert isinstance(connector, FileConnector)
            yield connector
        return
    root = tmp_path / "a model"
    root.mkdir()
    with connector_for(root if request.param == "local" else f"file://{tmp_path}/a%20model") as connector:
        assert isinstance(connector, FileConnector)
        yield connector


class TestFiles:
    def test_files_come_back_byte_equal(self, files: FileConnector) -> None:
        content = bytes(range(256)) * 5000
        files.write("sub/dir/a.bin", len(content), [memoryview(content)[:7], memoryview(content)[7:]])
        files.write("empty", 0, [])
        assert [(info.path, info.size) for info in files.list_files()] == [
            ("empty", 0),
            ("sub/dir/a.bin", len(content)),
        ]
        buffer = bytearray(len(content) + 5)
        assert files.read_into("sub/dir/a.bin", 0, memoryview(buffer)) == len(content)
        assert buffer == content + bytes(5)
        part = bytearray(100)
        assert files.read_into("sub/dir/a.bin", 1000, memoryview(part)) == 100
        assert part == content[1000:1100]
        assert files.read_into("sub/dir/a.bin", len(content) - 3, memoryview(part)) == 3
        assert files.read_into("sub/dir/a.bin", len(content) + 9, memoryview(part)) == 0
        assert files.read_into("empty", 0, memoryview(part)) == 0

    def test_a_write_is_whole_or_not_there(self, files: FileConnector) -> None:
        files.write("a", 3, [memoryview(b"old")])

        def breaks() -> Iterator[memoryview]:
            yield memoryview(b"ne")
            raise RuntimeError("the source broke")

        with pytest.raises(RuntimeError, match="the source broke"):
            files.write("a", 3, breaks())
        for blocks in ([memoryview(b"ne")], [memoryview(b"new!")]):
            with pytest.raises(ValueError, match="for a file of 3"):
                files.write("a", 3, blocks)
        buffer = bytearray(4)
        assert files.read_into("a", 0, memoryview(buffer)) == 3
        assert buffer == b"old\0"
        assert [info.path for info in files.list_files()] == ["a"]

    def test_a_block_may_be_reused_by_its_source(self, files: FileConnector) -> None:
        block = bytearray(4)

        def blocks() -> Iterator[memoryview]:
            for number in range(3):
                block[:] = b"%04d" % number
                yield memoryview(block)

        files.write("a", 12, blocks())
        buffer = bytearray(12)
        files.read_into("a", 0, memoryview(buffer))
        assert buffer == b"000000010002"

    def test_the_tag_changes_with_the_content(self, files: FileConnector) -> None:
        files.write("a", 1, [memoryview(b"1")])
        (before,) = files.list_files()
        files.write("a", 1, [memoryview(b"2")])
        (after,) = files.list_files()
        assert before.etag is None or before.etag != after.etag

    def test_delete(self, files: FileConnector) -> None:
        files.write("a", 1, [memoryview(b"1")])
        assert files.delete("a") is True
        assert files.delete("a") is False
        assert listed(files) == []

    def test_what_is_not_there(self, files: FileConnector) -> None:
        with pytest.raises(NotFoundError, match="none") as caught:
            files.read_into("none", 0, memoryview(bytearray(1)))
        assert (caught.value.url, caught.value.key) == (files.url, "none")

    @pytest.mark.parametrize("path", ["", "/etc/hostname", "../x", "a/../../x", "./a", "a//b", "a/", "a\0"])
    def test_paths_stay_inside(self, files: FileConnector, path: str) -> None:
        uses: list[Callable[[], object]] = [
            lambda: files.read_into(path, 0, memoryview(bytearray(1))),
            lambda: files.write(path, 0, []),
            lambda: files.delete(path),
        ]
        for use in uses:
            with pytest.raises(FormatError):
                use()

    def test_close_is_idempotent_and_use_after_it_is_one_clear_error(self, files: FileConnector) -> None:
        files.close()
        files.close()
        uses: list[Callable[[], object]] = [
            files.list_files,
            lambda: files.read_into("a", 0, memoryview(bytearray(1))),
            lambda: files.write("a", 0, []),
            lambda: files.delete("a"),
        ]
        for use in uses:
            with pytest.raises(UnavailableError, match="is closed"):
                use()
