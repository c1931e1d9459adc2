"""The functions that do one thing with a url: open the model, do it, close."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rdmaload import metrics
from rdmaload.connectors.registry import connector_for
from rdmaload.model import Model
from rdmaload.node_group import NodeGroup
from rdmaload.options import Options
from rdmaload.report import ProgressCallback
from rdmaload.selection import Patterns
from rdmaload.stats import LoadStats

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["load", "load_into", "open", "pull_files", "weight_iterator"]


def open(url: str | Path, *, options: Options | None = None, **opts: object) -> Model:
    """Open the model at `url`; keywords are options (see docs/settings.md).

    Raises UrlError, AuthenticationError, NotFoundError, UnavailableError, IntegrityError, FormatError.
    """
    connector = None
    try:
        connector = connector_for(url, options, **opts)
        return Model(connector, owns_connector=True)
    except BaseException as error:
        if connector is not None:
            connector.close()
        metrics.failed_to_open(error)
        raise


def load(
    url: str | Path,
    *,
    rank: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    stats: LoadStats | None = None,
    progress: ProgressCallback | None = None,
    options: Options | None = None,
    **opts: object,
) -> dict[str, torch.Tensor]:
    """`open(url).load(...)`: a dict of tensors that own their memory."""
    with open(url, options=options, **opts) as model:
        return model.load(
            rank=rank, device=device, dtype=dtype, include=include, exclude=exclude, stats=stats, progress=progress
        )


def weight_iterator(
    url: str | Path,
    rank: int | None = None,
    *,
    device: str | torch.device = "cpu",
    include: Patterns = None,
    exclude: Patterns = None,
    borrow: bool = False,
    node: NodeGroup | None = None,
    stats: LoadStats | None = None,
    progress: ProgressCallback | None = None,
    options: Options | None = None,
    **opts: object,
) -> Iterator[tuple[str, torch.Tensor]]:
    """`open(url).weight_iterator(...)`; `window_bytes` is an option like any other.

    Errors of opening come from this call. The model is closed at the end, and when the iterator is dropped.
    """
    model = open(url, options=options, **opts)
    try:
        tensors = model.weight_iterator(
            rank,
            device=device,
            include=include,
            exclude=exclude,
            borrow=borrow,
            node=node,
            stats=stats,
            progress=progress,
        )
    except BaseException:
        model.close()
        raise
    return _ClosingIterator(model, tensors)


class _ClosingIterator(Iterator[tuple[str, "torch.Tensor"]]):
    """Closes its model at the end; as a generator would, but also when it was never started."""

    def __init__(self, model: Model, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._model = model
        self._tensors = tensors

    def __next__(self) -> tuple[str, torch.Tensor]:
        try:
            return next(self._tensors)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop reading and close the model. Idempotent."""
        try:
            self._tensors.close()  # type: ignore[attr-defined]  # a generator
        finally:
            self._model.close()

    def __del__(self) -> None:
        self.close()


def load_into(
    target: nn.Module | Mapping[str, torch.Tensor],
    url: str | Path,
    *,
    rank: int | None = None,
    strict: bool = True,
    cast: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
    stats: LoadStats | None = None,
    progress: ProgressCallback | None = None,
    options: Options | None = None,
    **opts: object,
) -> LoadStats:
    """`open(url).load_into(target, ...)`."""
    with open(url, options=options, **opts) as model:
        return model.load_into(
            target,
            rank=rank,
            strict=strict,
            cast=cast,
            include=include,
            exclude=exclude,
            stats=stats,
            progress=progress,
        )


def pull_files(
    url: str | Path,
    target: str | Path | None = None,
    *,
    allow_pattern: Patterns = None,
    ignore_pattern: Patterns = None,
    stats: LoadStats | None = None,
    progress: ProgressCallback | None = None,
    options: Options | None = None,
    **opts: object,
) -> Path:
    """`open(url).pull_files(target, ...)`."""
    with open(url, options=options, **opts) as model:
        return model.pull_files(
            target, allow_pattern=allow_pattern, ignore_pattern=ignore_pattern, stats=stats, progress=progress
        )
