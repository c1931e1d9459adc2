"""Resolving a url to one generation: what is damaged on the way is read again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import rdmaload
from rdmaload.connectors.memory import MemoryConnector
from rdmaload.generations import resolve
from rdmaload.urls import parse_url


class Flipping(MemoryConnector):
    """Flips one bit of the first `flips` values whose key ends with `ending`."""

    ending = ""
    flips = 0

    def get(self, key: str) -> bytes | None:
        value = super().get(key)
        if value is None or not key.endswith(self.ending) or self.flips == 0:
            return value
        self.flips -= 1
        return bytes([value[0] ^ 1]) + value[1:]


@pytest.fixture
def connector(model: str) -> Iterator[Flipping]:
    url = f"memory://generations/{model}"
    rdmaload.save({"w": torch.ones(3)}, url)
    with Flipping(parse_url(url)) as opened:
        yield opened


@pytest.mark.parametrize("ending", ["/manifest", "/index"])
def test_a_value_damaged_on_the_way_is_read_again(ending: str, connector: Flipping) -> None:
    connector.ending, connector.flips = ending, 2
    manifest, index = resolve(connector)
    assert connector.flips == 0
    assert manifest.files == len(index.files) == 1


@pytest.mark.parametrize("ending", ["/manifest", "/index"])
def test_a_damaged_value_is_an_error_that_names_it(ending: str, connector: Flipping) -> None:
    connector.ending, connector.flips = ending, 100
    with pytest.raises(rdmaload.IntegrityError) as caught:
        resolve(connector)
    assert connector.flips == 97
    assert caught.value.key is not None
    assert caught.value.key.endswith(ending)
