"""What S3 and its likes, and botocore, say of a failure: the error of ours that it is."""

from __future__ import annotations

import re
from http.client import HTTPException
from typing import Any

from rdmaload.connectors.http_client import shown_url
from rdmaload.connectors.http_statuses import meaning_of_status
from rdmaload.connectors.tls import failure_in, meaning_of_failure
from rdmaload.errors import (
    AuthenticationError,
    IntegrityError,
    LoadTimeoutError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
    UrlError,
)

__all__ = ["meaning_of"]

_URLS = re.compile(r"https?://[^\s\"')]+")
# User and password of any url, a proxy's included, with slashes that their owner forgot to encode; not host and port.
_USERS = re.compile(r"(?<=//)(?:[^\s\"'/@]*@)+|(?<=//)(?![^\s\"'/@]*:\d+/)[^\s\"'/@]*:[^\s\"']*@")
_NOT_FOUND = frozenset({"404", "NoSuchKey", "NoSuchBucket", "NotFound", "NoSuchUpload", "NoSuchVersion"})
_REFUSED = frozenset(
    {
        "403",
        "401",
        "AccessDenied",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_BUSY = frozenset(
    {
        "408",
        "429",
        "BandwidthLimitExceeded",
        "IncompleteBody",
        "InternalError",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
    }
)
_CREDENTIALS = (
    "NoCredentials",
    "PartialCredentials",
    "CredentialRetrieval",
    "SSO",
    "Token",
    "UnauthorizedSSO",
    "Login",
    "InvalidIMDSEndpoint",
    "MetadataRetrieval",
    "NoAuthToken",
    "RefreshWithMFA",
    "UnknownCredential",
    "UnknownTokenProvider",
)

_CHECK = "check the credentials and what they may do"
_FOR_CREDENTIALS = frozenset(
    {"AssumeRole", "AssumeRoleWithSAML", "AssumeRoleWithWebIdentity", "CreateToken", "GetRoleCredentials"}
)


_UNSUPPORTED = ("Unsupported", "MissingDependency")
_BUCKET_NAME = re.compile(r'Invalid bucket name "([^"]*)"')


def meaning_of(err: Exception, verb: str, path: str | None, url: str) -> RdmaloadError:
    """What an exception of botocore means to the caller, without secrets of urls."""
    from botocore.exceptions import ClientError

    place = f"{path} in {url}" if path else url
    if isinstance(err, ClientError):
        kind, hint, text = _meaning_of_answer(err)
    else:
        kind, hint = _meaning_of_failure(err)
        text = _words(err)
    text = _URLS.sub(lambda found: shown_url(found[0]), _USERS.sub("", text))
    message = f"cannot {verb} {place}: {text}"
    if hint:
        message = f"{message.rstrip('.')}. {hint[0].upper()}{hint[1:]}"
    return kind(message, url=url, key=path)


def _words(err: Exception) -> str:
    """The library's, but for what it says in two lines and a regular expression."""
    from urllib3.exceptions import LocationParseError

    text = str(err)
    if isinstance(getattr(err, "kwargs", {}).get("error"), LocationParseError):
        return "the url of the endpoint or of a proxy makes no sense"  # they show it, with what may be a password
    bucket = _BUCKET_NAME.search(text)
    if bucket is not None:
        return (
            f"a bucket cannot be called {bucket[1]}: names have 1 to 255 letters, digits, dots, hyphens and underscores"
        )
    known = type(err).__module__.startswith(("botocore", "urllib3", "builtins"))
    return text if known and text else f"{type(err).__name__} {text}".rstrip()


def _meaning_of_answer(err: Any) -> tuple[type[RdmaloadError], str, str]:
    """Class, hint and text of what a store answered."""
    error = err.response.get("Error", {})
    status = int(err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    kind, hint = _meaning_of_code(str(error.get("Code", "")), status)
    asked = ""
    if err.operation_name in _FOR_CREDENTIALS:
        asked = f" ({err.operation_name})"  # it was not the bucket's store that refused
        if kind is not UnavailableError:
            kind, hint = AuthenticationError, _CHECK
    return kind, hint, f"{error.get('Code', status)}{asked}: {error.get('Message') or 'no further word'}"


def _meaning_of_code(code: str, status: int) -> tuple[type[RdmaloadError], str]:
    if code in _NOT_FOUND:
        return NotFoundError, "check bucket and prefix" if code == "NoSuchBucket" else ""
    if code in _REFUSED:
        return AuthenticationError, _CHECK
    if code in ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"):
        return IntegrityError, "the bytes that arrived there are not those that were sent: try again"
    if code == "400":  # without a word, as HEAD answers what is wrong with credentials
        return UrlError, "check the credentials, the url and the options"
    if code == "PreconditionFailed":
        return meaning_of_status(412)
    if code in ("PermanentRedirect", "301", "IllegalLocationConstraintException"):
        return UrlError, "the bucket is in another region: give region="
    if code in ("NotImplemented", "MethodNotAllowed"):
        return NotSupportedError, ""
    if code == "InvalidObjectState":
        return NotSupportedError, "it is archived: restore it first"
    if code in ("InvalidBucketName", "InvalidURI", "KeyTooLongError"):
        return UrlError, "correct the url"
    if code in _BUSY:
        return UnavailableError, ""
    kind, hint = meaning_of_status(status)
    return kind, "" if kind in (UnavailableError, NotFoundError) else hint


def _meaning_of_failure(err: Exception) -> tuple[type[RdmaloadError], str]:
    """Class and hint of what went wrong before there was an answer, or while it came."""
    from botocore import exceptions as theirs
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError, LocationValueError

    name, cause = type(err).__name__, getattr(err, "kwargs", {}).get("error")
    cause = cause if isinstance(cause, BaseException) else err
    stale = isinstance(err, RuntimeError) and "redentials" in str(err)  # what was fetched anew has expired, too
    if (
        stale
        or name.startswith(_CREDENTIALS)
        or isinstance(err, (theirs.ProfileNotFound, theirs.ConfigParseError, FileNotFoundError, PermissionError))
    ):
        return (
            AuthenticationError,
            "set up credentials as for the aws command, or give unsigned=true for a public bucket",
        )
    failure = failure_in(cause)
    if failure is not None:
        return meaning_of_failure(failure)
    if isinstance(err, theirs.ParamValidationError) or isinstance(cause, (LocationValueError, ValueError)):
        return UrlError, "correct the url or its endpoint_url"
    if isinstance(err, (theirs.ReadTimeoutError, theirs.ConnectTimeoutError)) or "Timeout" in name:
        return LoadTimeoutError, ""
    if isinstance(
        err,
        (
            theirs.ConnectionError,
            theirs.HTTPClientError,
            theirs.IncompleteReadError,
            ResponseParserError,  # a document that was cut short
            HTTPError,
            HTTPException,
            OSError,
        ),
    ):
        return UnavailableError, ""
    if isinstance(err, (theirs.ChecksumError, theirs.FlexibleChecksumError)):
        return IntegrityError, ""
    if name.startswith(_UNSUPPORTED):
        return NotSupportedError, ""
    if isinstance(err, theirs.BotoCoreError):
        return UrlError, f"correct the url, or what environment and profile say ({name})"
    return RdmaloadError, ""
