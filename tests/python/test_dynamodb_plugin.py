"""The example plug-in: found by its scheme, and a model that goes through it and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import moto
import pytest
from dynamodb_connector import DynamoDbConnector

import rdmaload
from rdmaload.connectors import KeyValueConnector, connector_for, registry
from rdmaload.errors import NotFoundError
from tests.support.checkpoints import Checkpoint


@pytest.fixture(scope="module")
def dynamodb_table() -> Iterator[str]:
    """The name of an empty table in this process's DynamoDB; its scheme is registered."""
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        patch.setitem(registry._registered, "dynamodb", DynamoDbConnector)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        client = boto3.client("dynamodb", region_name="us-east-1")
        client.create_table(
            TableName="models",
            KeySchema=[{"AttributeName": "key", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "key", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
        client.close()
        yield "models"


def test_it_is_found_by_its_scheme_with_its_own_option(dynamodb_table: str) -> None:
    with connector_for(f"dynamodb://{dynamodb_table}/m?region=us-east-1&connections=3") as connector:
        assert type(connector).__name__ == "DynamoDbConnector"
        assert connector.options.connections == 3


def test_a_table_that_there_is_not(dynamodb_table: str) -> None:
    with connector_for(f"dynamodb://not-{dynamodb_table}/m") as connector:
        assert isinstance(connector, KeyValueConnector)
        with pytest.raises(NotFoundError, match="no table not-"):
            connector.get("m/a")


def test_a_checkpoint_is_saved_and_loaded_byte_equal(
    dynamodb_table: str, model: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    url = f"dynamodb://{dynamodb_table}/{model}"
    saved = rdmaload.save(tiny_checkpoint.directory, url)
    assert saved.published
    stats = rdmaload.LoadStats()
    state = rdmaload.load(url, stats=stats)
    assert stats.path == "python"
    assert stats.verified_bytes > 0
    assert stats.unverified_bytes == 0
    expected = {}
    for path in sorted(Path(tiny_checkpoint.directory).glob("*.safetensors")):
        expected |= load_file(path)
    assert state.keys() == expected.keys()
    # Compared as bytes: random bits hold NaNs, which equal nothing.
    for name, tensor in state.items():
        assert tensor.view(torch.uint8).equal(expected[name].view(torch.uint8)), name
    rdmaload.save(url, tmp_path / "copy")
    for path in Path(tiny_checkpoint.directory).iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
