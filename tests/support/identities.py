"""Where S3 credentials come from, for tests: STS, a container's and a machine's metadata, SSO, a program.

Credentials are numbered: KEY1 with token-1, KEY2 with token-2 ... `honours` is a store that takes them and no others.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from tests.support.s3 import Answer, HttpObjects, Reply, Request

__all__ = ["SOURCES", "Identities", "honours", "key_of", "set_up"]

SOURCES = ("web identity", "assumed role", "container", "program", "sso", "machine")

_PROGRAM = """
import json, sys
count = int(open(sys.argv[1]).read()) + 1
open(sys.argv[1], "w").write(str(count))
print(json.dumps({"Version": 1, "AccessKeyId": f"KEY{count}", "SecretAccessKey": "hush-hush", "SessionToken":
      f"token-{count}", "Expiration": sys.argv[2]}))
"""


class Identities:
    """Gives out credentials, to whom asks as it should, that end in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.ends = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)
        self.refused: list[str] = []
        """What was asked, and not as it should be."""
        self._count = 0
        self._server = HttpObjects({}, self._answer)
        self.endpoint = self._server.endpoint

    def close(self) -> None:
        self._server.close()

    def __enter__(self) -> Identities:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, request: Request, honest: Reply) -> Reply:
        form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
        given = request.headers.get("authorization", "")
        if form.get("Action") == "AssumeRoleWithWebIdentity" and form["WebIdentityToken"] == "who-the-pod-is":
            return self._of_sts("AssumeRoleWithWebIdentity")
        if form.get("Action") == "AssumeRole" and "Credential=BASE/" in given:
            return self._of_sts("AssumeRole")
        if request.path == "/container" and given == "the container":
            return self._of_metadata()
        if request.path == "/token" and b"refresh-it" in request.body:
            return _json({"accessToken": "signed-on", "expiresIn": 3600, "tokenType": "Bearer"})
        if request.path == "/federation/credentials" and request.headers["x-amz-sso_bearer_token"] == "signed-on":
            key, token = self._next()
            found = {"accessKeyId": key, "secretAccessKey": "hush-hush", "sessionToken": token}
            return _json({"roleCredentials": found | {"expiration": int(self.ends.timestamp() * 1000)}})
        if (request.method, request.path) == ("PUT", "/latest/api/token"):
            return Reply(200, {}, b"of-the-machine")
        if request.headers.get("x-aws-ec2-metadata-token") == "of-the-machine":
            if request.path.endswith("/security-credentials/"):
                return Reply(200, {}, b"role")
            return self._of_metadata()
        self.refused.append(f"{request.method} {request.path}")
        word = b"<Error><Code>InvalidIdentityToken</Code><Message>who is it?</Message></Error>"
        return Reply(400, {"Content-Type": "text/xml"}, b"<ErrorResponse>%b</ErrorResponse>" % word)

    def _next(self) -> tuple[str, str]:
        self._count += 1
        return f"KEY{self._count}", f"token-{self._count}"

    def _of_sts(self, action: str) -> Reply:
        key, token = self._next()
        text = (
            f"<{action}Response><{action}Result><Credentials><AccessKeyId>{key}</AccessKeyId>"
            f"<SecretAccessKey>hush-hush</SecretAccessKey><SessionToken>{token}</SessionToken>"
            f"<Expiration>{self.ends:%Y-%m-%dT%H:%M:%SZ}</Expiration></Credentials><AssumedRoleUser>"
            "<AssumedRoleId>1:loader</AssumedRoleId><Arn>arn:aws:sts::123456789012:assumed-role/loader/x</Arn>"
            f"</AssumedRoleUser></{action}Result></{action}Response>"
        )
        return Reply(200, {"Content-Type": "text/xml"}, text.encode())

    def _of_metadata(self) -> Reply:
        key, token = self._next()
        found = {"Code": "Success", "AccessKeyId": key, "SecretAccessKey": "hush-hush", "Token": token}
        return _json(found | {"Expiration": f"{self.ends:%Y-%m-%dT%H:%M:%SZ}"})


def set_up(source: str, identities: Identities, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment and files of a process that has its credentials from there; it had none."""
    role = "arn:aws:iam::123456789012:role/loader"
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false" if source == "machine" else "true")
    config = directory / "config"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    for name in ("STS", "SSO", "SSO_OIDC"):
        monkeypatch.setenv(f"AWS_ENDPOINT_URL_{name}", identities.endpoint)
    if source == "web identity":
        (directory / "token").write_text("who-the-pod-is")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(directory / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", role)
    elif source == "assumed role":
        config.write_text(
            f"[default]\nrole_arn = {role}\nsource_profile = base\n"
            "[profile base]\naws_access_key_id = BASE\naws_secret_access_key = hush-base\n"
        )
    elif source == "container":
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{identities.endpoint}/container")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "the container")
    elif source == "program":
        (directory / "program.py").write_text(_PROGRAM)
        (directory / "count").write_text("0")
        words = [sys.executable, directory / "program.py", directory / "count", identities.ends.isoformat()]
        config.write_text(f"[default]\ncredential_process = {' '.join(str(word) for word in words)}\n")
    elif source == "sso":
        config.write_text(
            "[default]\nsso_session = work\nsso_account_id = 123456789012\nsso_role_name = loader\n"
            "[sso-session work]\nsso_start_url = https://start.invalid\nsso_region = us-east-1\n"
        )
        past, future = "2020-01-01T00:00:00Z", "2100-01-01T00:00:00Z"
        signed_on = {"startUrl": "https://start.invalid", "region": "us-east-1", "accessToken": "too-old"}
        signed_on |= {"expiresAt": past, "refreshToken": "refresh-it", "clientId": "c", "clientSecret": "hush-client"}
        name = hashlib.sha1(b"work").hexdigest()
        (directory / f"{name}.json").write_text(json.dumps(signed_on | {"registrationExpiresAt": future}))
        for holder in ("tokens.SSOTokenProvider", "credentials.SSOProvider"):
            monkeypatch.setattr(f"botocore.{holder}._SSO_TOKEN_CACHE_DIR", str(directory))
    else:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", identities.endpoint)


def key_of(request: Request) -> str:
    """The access key id that a request was signed with; "" where it was not."""
    text = request.query.get("X-Amz-Credential") or request.headers.get("authorization", "").partition("Credential=")[2]
    return text.partition("/")[0]


def honours(uses: int = 10**9) -> Answer:
    """A store that takes such credentials, with the token that belongs to them, for so many requests each."""
    used: dict[str, int] = {}

    def answer(request: Request, honest: Reply) -> Reply:
        key = key_of(request)
        token = request.query.get("X-Amz-Security-Token") or request.headers.get("x-amz-security-token", "")
        if not key.startswith("KEY") or token != f"token-{key.removeprefix('KEY')}":
            return Reply(403, {}, b"<Error><Code>InvalidAccessKeyId</Code><Message>who?</Message></Error>")
        used[key] = used.get(key, 0) + 1
        if used[key] > uses:
            return Reply(400, {}, b"<Error><Code>ExpiredToken</Code><Message>it has expired</Message></Error>")
        return honest

    return answer


def _json(document: object) -> Reply:
    return Reply(200, {"Content-Type": "application/json"}, json.dumps(document).encode())
