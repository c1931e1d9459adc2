"""Source files of a save: state dicts as virtual safetensors files, directories, stored models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_save
from safetensors.torch import save_file

from rdmaload import state_dict
from rdmaload._save import save
from rdmaload.connectors import KeyValueConnector, connector_for
from rdmaload.connectors.local import LocalConnector
from rdmaload.errors import (
    FormatError,
    IntegrityError,
    LayoutMismatchError,
    NotFoundError,
    NotSupportedError,
    StaleGenerationError,
)
from rdmaload.sources import Source, SourceModel, directory_model, read_manifest, stored_model
from rdmaload.state_dict import state_dict_model
from rdmaload.urls import parse_url

DTYPES = [name for _, name in state_dict._DTYPES if hasattr(torch, name)]


def content(source: Source, step: int = 1000) -> bytes:
    """The whole file, read in steps that hit every kind of boundary."""
    data = bytearray(source.size)
    view = memoryview(data)
    for offset in range(0, source.size, step):
        part = view[offset : offset + step]
        assert source.read_into(offset, part) == len(part)
    assert source.read_into(source.size, memoryview(bytearray(4))) == 0
    return bytes(data)


def model_of(state: Mapping[str, object], rank: int | None = None) -> SourceModel:
    return state_dict_model(state, rank=rank, world_size=None if rank is None else 4)


def random_tensor(dtype: str, *shape: int) -> torch.Tensor:
    kind = getattr(torch, dtype)
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (*shape, kind.itemsize), dtype=torch.uint8)
    return raw.view(kind).reshape(shape)


def test_every_dtype_gives_the_bytes_of_the_safetensors_writer() -> None:
    state = {}
    for dtype in DTYPES:
        state[f"{dtype}.matrix"] = random_tensor(dtype, 3, 4)
        state[f"{dtype}.empty"] = torch.empty(0, 4, dtype=getattr(torch, dtype))
        if dtype != "float4_e2m1fn_x2":
            state[f"{dtype}.scalar"] = random_tensor(dtype, 1).reshape(())
    (source,) = model_of(state).files
    expected = safetensors_save(state, {"format": "pt"})
    assert content(source, 7) == content(source, 4096) == expected
    assert source.header == expected[8 : 8 + int.from_bytes(expected[:8], "little")]
    assert source.size == len(expected)


def test_names_are_escaped_and_ordered_as_the_safetensors_writer_does() -> None:
    names = [
        'quote"',
        "back\\slash",
        "line\nfeed",
        "\x01\x7f",
        "é",
        "z",
        "Z",
        "a.b",
        "",
        "\U0001f600",
    ]
    state = {name: torch.full((2,), number) for number, name in enumerate(names)}
    (source,) = model_of(state).files
    assert content(source) == safetensors_save(state, {"format": "pt"})


def test_an_empty_state_dict_is_one_file_without_tensors() -> None:
    (source,) = model_of({}).files
    assert content(source) == safetensors_save({}, {"format": "pt"})


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_range_of_any_strided_tensor_has_the_bytes_of_its_contiguous_copy(
    data: st.DataObject,
) -> None:
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensor = random_tensor(dtype, *shape)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    if data.draw(st.booleans()):
        tensor = tensor[:: data.draw(st.integers(1, 3))]
    if data.draw(st.booleans()):
        tensor = tensor.expand(2, *tensor.shape)
    if dtype == "complex64" and data.draw(st.booleans()):
        tensor = tensor.conj()
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    flat = dense.reshape(-1).view(torch.uint8)
    expected = bytes(flat.tolist())
    start = data.draw(st.integers(0, len(expected) - 1))
    length = data.draw(st.integers(1, len(expected) - start))
    buffer = bytearray(length)
    state_dict.copy_bytes(tensor, start, memoryview(buffer))
    assert bytes(buffer) == expected[start : start + length]


def test_lazy_conjugation_is_resolved() -> None:
    tensor = torch.randn(5, dtype=torch.complex64).conj()
    assert tensor.is_conj()
    assert tensor.is_contiguous()
    (source,) = model_of({"t": tensor}).files
    assert content(source) == safetensors_save({"t": tensor.resolve_conj().clone()}, {"format": "pt"})


def test_lazy_negation_is_resolved() -> None:
    tensor = torch.randn(5, dtype=torch.complex64).conj().imag
    assert tensor.is_neg()
    (source,) = model_of({"t": tensor}).files
    assert content(source) == safetensors_save({"t": tensor.resolve_neg().clone()}, {"format": "pt"})


def test_a_large_strided_tensor_is_copied_by_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    on_host = state_dict._on_host

    def spy(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.nbytes)
        return on_host(tensor)

    monkeypatch.setattr(state_dict, "_on_host", spy)
    tensor = torch.randn(512, 3, 1024).transpose(0, 2)  # 6 MB
    buffer = bytearray(65536)
    state_dict.copy_bytes(tensor, 12345, memoryview(buffer))
    assert sum(copied) <= 3 * len(buffer)


def test_tied_tensors_are_stored_once() -> None:
    weight = torch.randn(8, 4)
    state = {
        "embed": weight,
        "head": weight,
        "same_bytes": weight.clone(),
        "transposed": weight.t(),
        "part": weight[:4],
        "empty_a": torch.empty(0),
        "empty_b": torch.empty(0),
    }
    (source,) = model_of(state).files
    assert source.tied == {"head": "embed"}
    assert source.header is not None
    header = json.loads(source.header)
    assert set(header) == set(state) - {"head"} | {"__metadata__"}
    assert header["__metadata__"] == {"format": "pt", "head": "embed"}


def test_a_module_with_tied_parameters_and_buffers() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(4, 4)
            self.second = torch.nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("count", torch.tensor(3))

    (source,) = model_of(Module().state_dict()).files
    assert source.tied == {"second.weight": "first.weight"}
    assert source.header is not None
    assert {"first.bias", "count"} < set(json.loads(source.header))


def test_files_of_at_most_the_limit_and_a_list_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_dict, "_FILE_BYTES", 1000)
    state = {f"t{number}": torch.randn(100) for number in range(5)}
    state["huge"] = torch.randn(1000)
    state["alias"] = state["huge"]
    files = model_of(state).files
    assert [file.path for file in files] == [
        *(f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)),
        "model.safetensors.index.json",
    ]
    assert [dict(file.tied) for file in files] == [{}, {}, {}, {"alias": "huge"}, {}]
    listed = json.loads(content(files[-1]))
    assert listed["metadata"] == {"total_size": 6000}
    assert listed["weight_map"]["huge"] == files[3].path
    assert listed["weight_map"].keys() == state.keys() - {"alias"}


def test_ranks_name_their_files() -> None:
    model = model_of({"a": torch.ones(1)}, rank=2)
    assert (model.kind, model.world_size) == ("sharded", 4)
    assert [(file.path, file.rank) for file in model.files] == [("model-rank-2-part-0.safetensors", 2)]


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_saved_is_refused_by_name() -> None:
    quantised = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for value, reason in (
        (3, "int"),
        (torch.eye(3).to_sparse(), "sparse"),
        (quantised, "quantised"),
        (nested, "nested"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
    ):
        with pytest.raises(NotSupportedError, match=r"layer\.weight") as caught:
            model_of({"fine": torch.ones(1), "layer.weight": value})
        assert reason in str(caught.value)
    for name in (7, "__metadata__", "\ud800"):
        with pytest.raises(NotSupportedError):
            model_of({name: torch.ones(1)})  # type: ignore[dict-item]


def test_a_tensor_without_memory_is_refused_by_name() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)
    with pytest.raises(NotSupportedError, match="layer"):
        model_of({"layer": fake})


# ---- directories -------------------------------------------------------------------------------


def open_directory(root: Path, rank: int | None = None, world_size: int | None = None) -> SourceModel:
    connector = LocalConnector(parse_url(root))
    return directory_model(connector, root, rank=rank, world_size=world_size)


def test_a_directory_is_all_its_files(tmp_path: Path) -> None:
    save_file({"a": torch.randn(100)}, tmp_path / "model.safetensors")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.txt").write_bytes(b"x" * 5000)
    (tmp_path / "empty").touch()
    model = open_directory(tmp_path)
    assert [file.path for file in model.files] == ["empty", "model.safetensors", "sub/x.txt"]
    for file in model.files:
        assert content(file, 999) == (tmp_path / file.path).read_bytes()
    assert [file.header is not None for file in model.files] == [False, True, False]
    assert not model.files[0].read_into(0, memoryview(bytearray(1)))
    model.close()


def test_a_link_out_of_the_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "blob")
    model = open_directory(tmp_path / "model")
    assert content(model.files[0]) == b"content"
    model.close()


@pytest.mark.parametrize("how", ["write", "replace", "remove", "touch"])
def test_a_changed_file_is_noticed(tmp_path: Path, how: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    model = open_directory(tmp_path)
    (source,) = model.files
    content(source)
    source.check_unchanged()
    if how == "write":
        path.write_bytes(b"after!")
    elif how == "replace":
        (tmp_path / "new").write_bytes(b"after!")
        os.replace(tmp_path / "new", path)
    elif how == "remove":
        path.unlink()
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(IntegrityError, match="file"):
        source.check_unchanged()
    source.close()
    with pytest.raises(IntegrityError):
        content(source)
    assert source.fingerprint() != open_directory(tmp_path).files[0].fingerprint() if (how != "remove") else True
    model.close()


def test_the_content_id_changes_with_any_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    first = open_directory(tmp_path).content_id
    assert first == open_directory(tmp_path).content_id
    (tmp_path / "a").write_bytes(b"2")
    second = open_directory(tmp_path).content_id
    (tmp_path / "b").touch()
    assert len({first, second, open_directory(tmp_path).content_id}) == 3


def test_ranks_share_a_directory_by_the_names_of_their_files(tmp_path: Path) -> None:
    for rank in range(2):
        save_file({"a": torch.ones(1)}, tmp_path / f"model-rank-{rank}-part-0.safetensors")
    (tmp_path / "config.json").write_text("{}")
    model = open_directory(tmp_path, rank=1, world_size=2)
    assert [(file.path, file.rank) for file in model.files] == [
        ("config.json", None),
        ("model-rank-1-part-0.safetensors", 1),
    ]
    whole = open_directory(tmp_path)
    assert (whole.kind, whole.world_size) == ("sharded", 2)
    (tmp_path / "model-rank-0-part-0.safetensors").unlink()
    with pytest.raises(LayoutMismatchError, match="rank 0"):
        open_directory(tmp_path)


def test_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_directory(tmp_path / "missing")
    with pytest.raises(NotFoundError, match="no files"):
        open_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError):
        open_directory(tmp_path)


# ---- models of a store -------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path, model: str) -> tuple[str, dict[str, bytes]]:
    save_file({"a": torch.randn(1000), "b": torch.randn(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "empty").touch()
    url = f"memory://sources/{model}"
    save(tmp_path, url, chunk_bytes=1000)
    return url, {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("step", [1, 300, 1000, 1500, 2000, 10_000])
def test_a_stored_model_reads_by_any_range(stored: tuple[str, dict[str, bytes]], step: int) -> None:
    url, files = stored
    with connector_for(url) as connector:
        model = stored_model(connector)
        assert {file.path: content(file, step) for file in model.files} == files
        assert model.chunk_bytes == 1000


def test_a_damaged_chunk_is_read_again_then_refused(stored: tuple[str, dict[str, bytes]]) -> None:
    url, files = stored
    with connector_for(url) as connector:
        model = stored_model(connector)
        (source,) = [file for file in model.files if file.path == "model.safetensors"]
        key = next(
            key
            for key in connector.list(f"{connector.model}/chunks/")
            if key.endswith("/1")  # only the weight file has two chunks
        )
        good = connector.get(key)
        connector.set(key, b"x" + good[1:])
        with pytest.raises(IntegrityError, match="checksum after 3 reads") as caught:
            content(source, 1000)
        assert caught.value.key == key
        get_into, calls = connector.get_into, []

        def heals(wanted: str, buffer: memoryview) -> int:
            if wanted == key:
                calls.append(wanted)
                if len(calls) == 2:
                    connector.set(key, good)
            return get_into(wanted, buffer)

        connector.get_into = heals
        assert content(source, 1000) == files["model.safetensors"]


def test_a_missing_chunk_says_whether_it_was_replaced_or_evicted(
    stored: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    url, _ = stored
    with connector_for(url) as connector:
        model = stored_model(connector)
        connector.delete(*connector.list(f"{connector.model}/chunks/"))
        with pytest.raises(NotFoundError, match="evicted"):
            content(model.files[0])
        (tmp_path / "config.json").write_text("other")
        save(tmp_path, url)
        with pytest.raises(StaleGenerationError, match="copy again"):
            content(model.files[0])


def test_a_pinned_source_must_be_that_one(stored: tuple[str, dict[str, bytes]]) -> None:
    url, _ = stored
    with connector_for(url) as connector:
        with connector_for(url, generation="0" * 32) as other, pytest.raises(StaleGenerationError):
            stored_model(other)
        with connector_for(url, manifest_sha256="0" * 64) as other, pytest.raises(IntegrityError):
            stored_model(other)
        index = next(key for key in connector.list(connector.model) if key.endswith("/index"))
        connector.delete(index)
        with pytest.raises(NotFoundError):
            stored_model(connector)
        connector.set(index, b"RDMALOAD" + bytes(100))
        with pytest.raises(IntegrityError):
            stored_model(connector)


def test_a_pinned_source_that_was_replaced_is_copied(stored: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    url, files = stored
    with connector_for(url) as connector:
        assert isinstance(connector, KeyValueConnector)
        manifest = read_manifest(connector)
        assert manifest is not None
    (tmp_path / "config.json").write_text("other")
    save(tmp_path, url)
    with connector_for(url, generation=manifest.generation) as connector:
        model = stored_model(connector)
        assert {file.path: content(file) for file in model.files} == files
