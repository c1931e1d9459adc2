"""What a store's own library raises, as our errors: one rule for the connectors that stand on such a library."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

from rdmaload.errors import RdmaloadError

__all__ = ["TranslatesErrors"]


class TranslatesErrors(ABC):
    """A base beside FileConnector, for connectors that say what an exception of their library means."""

    @contextlib.contextmanager
    def _translated(self, verb: str, path: str | None = None) -> Iterator[None]:
        """What the store's library raises becomes an error of ours: "cannot {verb} {path} in {url}: ..."."""
        try:
            yield
        except (RdmaloadError, AssertionError):
            raise
        except Exception as err:
            raise self._meaning(err, verb, path) from err

    @abstractmethod
    def _meaning(self, err: Exception, verb: str, path: str | None) -> RdmaloadError:
        """What an exception of the store's library is to the caller, without secrets."""
