"""Every error that rdmaload raises on purpose, as one tree.

    RdmaloadError
    ├── UrlError             (ValueError)                     the url or an option is wrong
    ├── AuthenticationError  (PermissionError)                the store refused who we are or what we may do
    ├── NotFoundError        (LookupError, FileNotFoundError) no such model, file or key
    ├── UnavailableError     (ConnectionError)                the store cannot be reached or cannot serve now
    ├── LoadTimeoutError     (TimeoutError)                   a deadline or an inactivity limit passed
    ├── IntegrityError       (ValueError)                     bytes differ from their checksum
    ├── FormatError          (ValueError)                     bytes are not what the format says
    ├── LayoutMismatchError  (ValueError)                     the model and what is to receive it differ
    ├── StaleGenerationError (LookupError)                    the pinned generation was replaced and pruned
    ├── PartialLoadError     (RuntimeError)                   some tensors were already written: see `.loaded`
    ├── NotSupportedError    (NotImplementedError)            this build or this store cannot do that
    ├── DeviceError          (RuntimeError)                   the accelerator or its driver failed
    ├── AlreadyExistsError   (FileExistsError)                a save with overwrite=False found a model
    └── MemoryLimitError     (MemoryError)                    the work does not fit the memory that it may use

Each is also the builtin of the same meaning, so that `except FileNotFoundError` works for those who
do not import us. The message is complete by itself: it names the url (without secrets), the key and
what to do. `.url` and `.key` repeat the first two for programs.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AlreadyExistsError",
    "AuthenticationError",
    "DeviceError",
    "FormatError",
    "IntegrityError",
    "LayoutMismatchError",
    "LoadTimeoutError",
    "MemoryLimitError",
    "NotFoundError",
    "NotSupportedError",
    "PartialLoadError",
    "RdmaloadError",
    "StaleGenerationError",
    "UnavailableError",
    "UrlError",
]


class RdmaloadError(Exception):
    """Root of the tree; raised itself only for what no subclass says, such as a cancelled load.

    >>> raise NotFoundError("no model at redis://h/m; `rdmaload ls` lists them", key="m/manifest")
    Traceback (most recent call last):
    rdmaload.errors.NotFoundError: no model at redis://h/m; `rdmaload ls` lists them
    """

    def __init__(self, message: str = "", *, url: str | None = None, key: str | None = None) -> None:
        super().__init__(message)
        self.url = url
        self.key = key

    # OSError composes its text from errno and file name; ours is the message, whatever the second
    # base is.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    # The default goes through `cls(*args)` and, for OSError, drops keyword attributes.
    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), str(self), dict(self.__dict__))


def _restore(cls: type[RdmaloadError], message: str, attributes: dict[str, object]) -> RdmaloadError:
    error = cls(message)
    error.__dict__.update(attributes)
    return error


class UrlError(RdmaloadError, ValueError):
    """A url or an option is malformed, unknown, given twice with different values, or nothing that the store takes."""


class AuthenticationError(RdmaloadError, PermissionError):
    """The store refused the credentials, or the user may not run a command that is needed."""


class NotFoundError(RdmaloadError, LookupError, FileNotFoundError):
    """The model, file or key does not exist."""


class UnavailableError(RdmaloadError, ConnectionError):
    """The store cannot be reached, or answers that it cannot serve now; retries were used up."""


class LoadTimeoutError(RdmaloadError, TimeoutError):
    """A deadline passed, or no byte arrived for `inactivity_timeout` seconds."""


class IntegrityError(RdmaloadError, ValueError):
    """Bytes differ from their checksum after the re-reads that `max_integrity_attempts` allows."""


class FormatError(RdmaloadError, ValueError):
    """A manifest, index, header or reply is not what its format says."""


class LayoutMismatchError(RdmaloadError, ValueError):
    """The model was cut for another world size, parallel layout or engine, or is not what the target takes."""


class StaleGenerationError(RdmaloadError, LookupError):
    """The generation that was pinned is gone: the model was saved again and the old one pruned."""


class PartialLoadError(RdmaloadError, RuntimeError):
    """A load into existing tensors failed midway; `.loaded` names those that hold new values."""

    def __init__(
        self,
        message: str = "",
        *,
        url: str | None = None,
        key: str | None = None,
        loaded: Sequence[str] = (),
    ) -> None:
        super().__init__(message, url=url, key=key)
        self.loaded: list[str] = list(loaded)


class NotSupportedError(RdmaloadError, NotImplementedError):
    """This build, platform or store cannot do that; the message says what is missing."""


class DeviceError(RdmaloadError, RuntimeError):
    """The accelerator, its driver or its memory failed."""


class AlreadyExistsError(RdmaloadError, FileExistsError):
    """A save with `overwrite=False` found a model at its destination."""


class MemoryLimitError(RdmaloadError, MemoryError):
    """The work needs more memory than `max_host_bytes` or the control group allows."""
