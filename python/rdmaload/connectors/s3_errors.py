"""What S3 and its likes, and botocore, say of a failure: the error of ours that it is."""

from __future__ import annotations

import re

from rdmaload.connectors.http_client import shown_url
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
        "InternalError",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
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
)

_CHECK = "check the credentials and what they may do"
_FOR_CREDENTIALS = frozenset(
    {"AssumeRole", "AssumeRoleWithSAML", "AssumeRoleWithWebIdentity", "CreateToken", "GetRoleCredentials"}
)


def meaning_of(err: Exception, verb: str, path: str | None, url: str) -> RdmaloadError:
    """What an exception of botocore means to the caller, without secrets of urls."""
    from botocore import exceptions as theirs

    place = f"{path} in {url}" if path else url
    kind: type[RdmaloadError] = UnavailableError
    name, hint = type(err).__name__, ""
    text = _URLS.sub(lambda found: shown_url(found[0]), str(err))
    if isinstance(err, theirs.ClientError):
        error = err.response.get("Error", {})
        status = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        kind, hint = _meaning_of_code(str(error.get("Code", "")), int(status))
        asked = ""
        if err.operation_name in _FOR_CREDENTIALS:
            asked = f" ({err.operation_name})"  # it was not the bucket's store that refused
            if kind is not UnavailableError:
                kind, hint = AuthenticationError, _CHECK
        text = f"{error.get('Code', status)}{asked}: {error.get('Message') or 'no further word'}"
    elif name.startswith(_CREDENTIALS) or isinstance(err, (theirs.ProfileNotFound, theirs.ConfigParseError)):
        kind = AuthenticationError
        hint = "set up credentials as for the aws command, or give unsigned=true for a public bucket"
    elif isinstance(err, theirs.SSLError):
        kind, hint = AuthenticationError, "give the CA that signed the store's certificate by ca_file= or ca_dir="
    elif isinstance(err, (FileNotFoundError, PermissionError)):  # of a token or credentials that the profile names
        kind, hint = AuthenticationError, "set up credentials as for the aws command"
    elif isinstance(err, (theirs.ParamValidationError, ValueError)):
        kind, hint = UrlError, "correct the url or its endpoint_url"
    elif isinstance(err, (theirs.ReadTimeoutError, theirs.ConnectTimeoutError)) or "Timeout" in name:
        kind = LoadTimeoutError
    message = f"cannot {verb} {place}: {text}" + (f". {hint[0].upper()}{hint[1:]}" if hint else "")
    return kind(message, url=url, key=path)


def _meaning_of_code(code: str, status: int) -> tuple[type[RdmaloadError], str]:
    if code in _NOT_FOUND:
        return NotFoundError, "check bucket and prefix" if code == "NoSuchBucket" else ""
    if code in _REFUSED:
        return AuthenticationError, _CHECK
    if code in ("PreconditionFailed", "412"):
        return IntegrityError, "it was replaced after the model was opened: open it again"
    if code in ("PermanentRedirect", "301", "IllegalLocationConstraintException"):
        return UrlError, "the bucket is in another region: give region="
    if code in ("NotImplemented", "MethodNotAllowed", "501", "405"):
        return NotSupportedError, ""
    if code == "InvalidObjectState":
        return NotSupportedError, "it is archived: restore it first"
    if code in ("InvalidBucketName", "InvalidURI", "KeyTooLongError"):
        return UrlError, "correct the url"
    if status >= 500 or status in (408, 429) or code in _BUSY:
        return UnavailableError, ""
    if status in (401, 403, 407):
        return AuthenticationError, _CHECK
    if status in (404, 410):
        return NotFoundError, ""
    if status == 412:
        return IntegrityError, "it was replaced after the model was opened: open it again"
    return RdmaloadError, ""
