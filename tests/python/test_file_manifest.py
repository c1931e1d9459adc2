"""Which files a manifest vouches for in a store that it was not written in."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rdmaload._core import crc32c
from rdmaload.connectors.connector import FileInfo
from rdmaload.connectors.s3 import S3Connector
from rdmaload.errors import IntegrityError
from rdmaload.file_manifest import _vouched_for
from rdmaload.index import Index, IndexFile
from rdmaload.urls import parse_url

_CONTENT = b'{"layers": 32}'
_SAVED = IndexFile("config.json", len(_CONTENT), 0, etag='"as-saved"')
_INDEX = Index.of([_SAVED], chunk_bytes=4096, crcs=crc32c(_CONTENT).to_bytes(4, "little"))


class Listed(S3Connector):
    """A bucket that lists what a test says, and is asked for nothing else."""

    listing: Sequence[FileInfo] = ()

    def list_files(self) -> list[FileInfo]:
        return list(self.listing)


@pytest.mark.parametrize(
    ("listed", "vouched"),
    [
        (FileInfo("config.json", len(_CONTENT), '"copied"'), {"config.json": '"copied"'}),
        (FileInfo("config.json", len(_CONTENT) + 1, '"longer"'), {}),
        (FileInfo("config.json", len(_CONTENT) - 1, '"shorter"'), {}),
        (FileInfo("config.json", 0, '"emptied"'), {}),
        (FileInfo("config.json", len(_CONTENT), '"as-saved"'), {}),
        (FileInfo("config.json", len(_CONTENT), None), {}),
        (FileInfo("other.json", len(_CONTENT), '"copied"'), {}),
    ],
)
def test_a_file_with_another_tag_is_vouched_for_if_its_size_is_the_same(
    listed: FileInfo, vouched: dict[str, str]
) -> None:
    with Listed(parse_url("s3://bucket/m")) as connector:
        connector.listing = [listed]
        assert _vouched_for(connector, _INDEX) == vouched


def test_a_weight_file_of_another_size_is_not_what_its_manifest_says() -> None:
    index = Index((IndexFile("model.safetensors", 100, 0, None, b"{}", etag='"as-saved"'),))
    with Listed(parse_url("s3://bucket/m")) as connector:
        connector.listing = [FileInfo("model.safetensors", 101, '"replaced"')]
        with pytest.raises(
            IntegrityError, match=r"differs from its manifest: it has 101 .* save the model again"
        ) as caught:
            _vouched_for(connector, index)
        assert caught.value.key == "model.safetensors"
