"""From an error to its exit code and to the one line that is shown.

The package's docstring says what the codes mean.
"""

from __future__ import annotations

from rdmaload.errors import (
    AlreadyExistsError,
    AuthenticationError,
    DeviceError,
    FormatError,
    IntegrityError,
    LayoutMismatchError,
    LoadTimeoutError,
    MemoryLimitError,
    NotFoundError,
    NotSupportedError,
    PartialLoadError,
    RdmaloadError,
    StaleGenerationError,
    UnavailableError,
    UrlError,
)

__all__ = ["INTERRUPTED", "MEANINGS", "OTHER", "UsageError", "describe", "exit_code"]

OTHER = 1
INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended

MEANINGS = {
    0: "done",
    1: 'anything that no other code says, such as too little memory, or a "no" to a question',
    2: "usage: a wrong argument, url or option",
    3: "not found: no such model, file, key or generation",
    4: "data mismatch: a checksum, a format, or tensors that differ",
    5: "authentication: wrong or missing credentials, or no permission",
    6: "unreachable, full (the store's memory or disk), or timed out",
    7: "layout or identity: saved for other ranks, or for another engine",
    8: "unsupported: by this release, this installation or this store",
    INTERRUPTED: "interrupted",
}
"""What each code means, for help and manual pages."""


class UsageError(Exception):
    """The command line is wrong; the message says how."""


# The first that fits. Ours come before the builtins, which each of them also is.
_CODES: tuple[tuple[type[Exception], int], ...] = (
    (UsageError, 2),
    (UrlError, 2),
    (NotFoundError, 3),
    (StaleGenerationError, 3),
    (IntegrityError, 4),
    (FormatError, 4),
    (AuthenticationError, 5),
    (UnavailableError, 6),
    (LoadTimeoutError, 6),
    (LayoutMismatchError, 7),
    (NotSupportedError, 8),
    (AlreadyExistsError, OTHER),
    (MemoryLimitError, OTHER),
    (DeviceError, OTHER),
    # What the system says of a local file or directory means the same as ours.
    (FileNotFoundError, 3),
    (PermissionError, 5),
    (ConnectionError, 6),
    (TimeoutError, 6),
    (ImportError, 8),
)


def exit_code(error: BaseException) -> int:
    """The exit code for an error; for a partial load, that of what stopped it."""
    if isinstance(error, PartialLoadError) and isinstance(error.__cause__, Exception):
        return exit_code(error.__cause__)
    return next((code for kind, code in _CODES if isinstance(error, kind)), OTHER)


def describe(error: BaseException) -> str:
    """The text to show. Ours is complete by itself; others say what they are, too."""
    text = str(error)
    if isinstance(error, (RdmaloadError, UsageError)) and text:
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
