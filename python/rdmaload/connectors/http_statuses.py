"""What the status of an answer means, whichever client asked: http, S3's or obstore's.

The native transport says the same of the answers that it gets.
"""

from __future__ import annotations

from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    IntegrityError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)

__all__ = ["REDIRECTS", "meaning_of_status", "status_passes"]

REDIRECTS = (301, 302, 303, 307, 308)

_Meaning = tuple[type[RdmaloadError], str]
_REFUSED: _Meaning = (AuthenticationError, "check the credentials and what they may do")
_GONE: _Meaning = (NotFoundError, "check the url")
_REPLACED: _Meaning = (IntegrityError, "it was replaced after the model was opened: open it again")
_UNKNOWN: _Meaning = (NotSupportedError, "the server does not answer such requests")
_BUSY: _Meaning = (UnavailableError, "it cannot serve this now")
_ASTRAY: _Meaning = (UrlError, "it does not say where to go from there: correct the url")

_MEANINGS: dict[int, _Meaning] = {
    **dict.fromkeys((401, 402, 403, 407, 451), _REFUSED),
    **dict.fromkeys((404, 410), _GONE),
    **dict.fromkeys((412, 416), _REPLACED),
    **dict.fromkeys((405, 501, 505), _UNKNOWN),
    **dict.fromkeys((408, 409, 421, 423, 425, 429), _BUSY),
    **dict.fromkeys(REDIRECTS, _ASTRAY),
}


def meaning_of_status(status: int) -> tuple[type[RdmaloadError], str]:
    """The error that a status is, and what to do about it.

    >>> meaning_of_status(404)
    (<class 'rdmaload.errors.NotFoundError'>, 'check the url')
    """
    found = _MEANINGS.get(status)
    if found is not None:
        return found
    if status >= 500:
        return _BUSY
    if status < 400:
        return FormatError, "that is no answer to such a request"
    return UrlError, "check the url and the options"


def status_passes(status: int) -> bool:
    """Whether the same request may succeed a little later."""
    return meaning_of_status(status)[0] is UnavailableError
