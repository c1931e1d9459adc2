"""Google's and Azure's object stores for tests: the calls that obstore makes, with credentials that are checked.

Both keep whole objects in memory, list in pages, take parts, and refuse signatures and tokens that are not right.
`answer` bends what they say, as in HttpObjects.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from abc import abstractmethod
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

import obstore
from obstore.store import MemoryStore

from rdmaload._core import crc32c
from tests.support.s3 import Answer, HttpObjects, Reply, Request, etag_of, honest_reply

__all__ = ["AzureBlobs", "GoogleStorage"]

# obstore's threads and descriptors are the process's: begun before a test looks at what it leaves behind.
obstore.put(MemoryStore(), "first", b"")

_DATE = "Sun, 22 Nov 2026 08:00:00 GMT"


class _Cloud:
    """`objects` by "container/key"."""

    def __init__(self, *containers: str, page: int = 1000) -> None:
        self.objects: dict[str, bytes] = {}
        self.containers = set(containers)
        self.page = page
        self.answer: Answer = lambda request, honest: honest
        self.parts: dict[str, dict[str, bytes]] = {}
        self._server = HttpObjects({}, lambda request, _: self.answer(request, self.honest(request)))
        self.endpoint = self._server.endpoint

    @property
    def requests(self) -> list[Request]:
        return self._server.requests

    def honest(self, request: Request) -> Reply:
        """What a store without faults answers."""
        refused = self._refused(request)
        if refused is not None:
            return refused
        container, _, key = self._place(request)
        if container not in self.containers:
            return Reply(404, {}, b"<Error><Code>ContainerNotFound</Code><Message>no such container</Message></Error>")
        return self._asked(request, container, key)

    def _read(self, request: Request, name: str) -> Reply:
        reply = honest_reply(request, self.objects.get(name))
        reply.headers["Last-Modified"] = _DATE
        return reply

    def _page(self, container: str, prefix: str, after: str) -> tuple[list[str], str]:
        names = sorted(name for name in self.objects if name.startswith(f"{container}/{prefix}") and name > after)
        return names[: self.page], names[self.page - 1] if len(names) > self.page else ""

    @abstractmethod
    def _refused(self, request: Request) -> Reply | None: ...

    @abstractmethod
    def _place(self, request: Request) -> tuple[str, str, str]: ...

    @abstractmethod
    def _asked(self, request: Request, container: str, key: str) -> Reply: ...

    def close(self) -> None:
        self._server.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GoogleStorage(_Cloud):
    """The XML API. Takes the token "good-token", and what `service_account` signs; buckets in `public` are open."""

    def __init__(self, *buckets: str, public: str = "", page: int = 1000) -> None:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        key = rsa.generate_private_key(65537, 2048)
        self._public_key = key.public_key()
        private = serialization.PrivateFormat.PKCS8
        pem = key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
        self.service_account = json.dumps(
            {
                "type": "service_account",
                "client_email": "tester@example.invalid",
                "private_key": pem.decode(),
                "private_key_id": "1",
            }
        )
        self.public = public
        super().__init__(*buckets, page=page)

    def _is_signed(self, text: bytes, signature: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding

        try:
            self._public_key.verify(signature, text, padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature:
            return False
        return True

    def _refused(self, request: Request) -> Reply | None:
        query = request.query
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if "X-Goog-Signature" in query:
            given = sorted(
                item for item in urlsplit(request.target).query.split("&") if not item.startswith("X-Goog-Signature")
            )
            host = "storage.googleapis.com"  # whatever the endpoint is
            path = urlsplit(request.target).path
            canonical = f"{request.method}\n{path}\n{'&'.join(given)}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD"
            scope = query["X-Goog-Credential"].partition("/")[2]
            digest = hashlib.sha256(canonical.encode()).hexdigest()
            text = f"GOOG4-RSA-SHA256\n{query['X-Goog-Date']}\n{scope}\n{digest}"
            good = self._is_signed(text.encode(), bytes.fromhex(query["X-Goog-Signature"]))
        elif token.count(".") == 2:
            text, _, signature = token.rpartition(".")
            good = self._is_signed(text.encode(), base64.urlsafe_b64decode(signature + "=="))
        else:
            good = token == "good-token" or (not token and self._place(request)[0] == self.public)
        if good:
            return None
        code = b"AccessDenied" if token or "X-Goog-Signature" in query else b"AuthenticationRequired"
        return Reply(403 if token else 401, {}, b"<Error><Code>%b</Code><Message>refused</Message></Error>" % code)

    def _place(self, request: Request) -> tuple[str, str, str]:
        return request.path.lstrip("/").partition("/")

    def _asked(self, request: Request, container: str, key: str) -> Reply:
        query, name = dict(parse_qsl(urlsplit(request.target).query, keep_blank_values=True)), f"{container}/{key}"
        if not key and "list-type" in query:
            names, after = self._page(container, query.get("prefix", ""), query.get("continuation-token", ""))
            entries = "".join(
                f"<Contents><Key>{escape(name.partition('/')[2])}</Key><Size>{len(self.objects[name])}</Size>"
                f"<ETag>{escape(etag_of(self.objects[name]))}</ETag>"
                "<LastModified>2026-11-22T08:00:00.000Z</LastModified></Contents>"
                for name in names
            )
            more = f"<NextContinuationToken>{escape(after)}</NextContinuationToken>" if after else ""
            return _xml(f"<ListBucketResult>{entries}{more}</ListBucketResult>")
        if request.method in ("GET", "HEAD"):
            reply = self._read(request, name)
            if reply.status in (200, 206):  # as Google does, of the whole object with every part of it
                crc = base64.b64encode(crc32c(self.objects[name]).to_bytes(4, "big")).decode()
                reply.headers["x-goog-hash"] = f"crc32c={crc},md5=1B2M2Y8AsgTpgAmY7PhCfg=="
            return reply
        if request.method == "POST" and "uploads" in query:
            upload = str(request.number)
            self.parts[upload] = {}
            return _xml(f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>")
        upload = query.get("uploadId", "")
        if upload and upload not in self.parts:  # a part that was on its way when it was dropped
            return Reply(404, {}, b"<Error><Code>NoSuchUpload</Code><Message>no such upload</Message></Error>")
        if request.method == "PUT" and upload:
            self.parts[upload][query["partNumber"]] = request.body
            return Reply(200, {"ETag": etag_of(request.body)})
        if request.method == "POST" and upload:
            order = re.findall(rb"<PartNumber>(\d+)</PartNumber>", request.body)
            parts = self.parts.pop(upload)
            self.objects[name] = b"".join(parts[number.decode()] for number in order)
            etag = escape(etag_of(self.objects[name]))
            return _xml(f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>")
        if request.method == "DELETE" and upload:
            self.parts.pop(upload)
            return Reply(204)
        if request.method == "PUT":
            self.objects[name] = request.body
            return Reply(200, {"ETag": etag_of(request.body)})
        if request.method == "DELETE":
            return Reply(204 if self.objects.pop(name, None) is not None else 404)
        return Reply(405)


class AzureBlobs(_Cloud):
    """One account, "account". Takes its `key`, what that signs, and the token "good-token" (which may sign nothing)."""

    key = base64.b64encode(b"the key of the account, 32 bytes").decode()

    def shared(self) -> str:
        """A signature for the whole account, of which only that it is there is checked."""
        return "sv=2022-11-02&ss=b&srt=sco&sp=rwdlac&se=2099-01-01T00%3A00%3A00Z&sig=for-the-account"

    def _sign(self, text: str) -> str:
        digest = hmac.new(base64.b64decode(self.key), text.encode(), hashlib.sha256).digest()
        return base64.b64encode(digest).decode()

    def _refused(self, request: Request) -> Reply | None:
        query, given = request.query, request.headers.get("authorization", "")
        path = urlsplit(request.target).path
        if query.get("ss") == "b":
            good = query["sig"] == "for-the-account"
        elif "sig" in query:
            resource = f"/blob{unquote(path)}"
            fields = [query.get(name, "") for name in ("sp", "st", "se")] + [resource, "", "", "", query.get("sv", "")]
            good = query["sig"] == self._sign("\n".join([*fields, query.get("sr", ""), *[""] * 7]))
        elif given.startswith("SharedKey account:"):
            names = ["content-encoding", "content-language", "content-length", "content-md5", "content-type", "date"]
            names += ["if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range"]
            values = [request.headers.get(name, "") for name in names]
            values[2] = "" if values[2] == "0" else values[2]
            ours = sorted(f"{name}:{text}" for name, text in request.headers.items() if name.startswith("x-ms-"))
            pairs = sorted(parse_qsl(urlsplit(request.target).query, keep_blank_values=True))
            resource = "\n".join([f"/account{path}", *(f"{name}:{text}" for name, text in pairs)])
            text = "\n".join([request.method, *values, *ours, resource])
            good = given == f"SharedKey account:{self._sign(text)}"
        else:
            good = given == "Bearer good-token" and "userdelegationkey" not in request.target
        if good:
            return None
        return Reply(403, {}, b"<Error><Code>AuthenticationFailed</Code><Message>refused</Message></Error>")

    def _place(self, request: Request) -> tuple[str, str, str]:
        return request.path.lstrip("/").partition("/")[2].partition("/")

    def _asked(self, request: Request, container: str, key: str) -> Reply:
        query, name = request.query, f"{container}/{key}"
        if query.get("comp") == "list":
            names, after = self._page(container, query.get("prefix", ""), query.get("marker", ""))
            blobs = "".join(
                f"<Blob><Name>{escape(name.partition('/')[2])}</Name><Properties><Last-Modified>{_DATE}</Last-Modified>"
                f"<Content-Length>{len(self.objects[name])}</Content-Length>"
                f"<Content-Type>application/octet-stream</Content-Type><Etag>{escape(etag_of(self.objects[name]))}</Etag>"
                "</Properties></Blob>"
                for name in names
            )
            return _xml(
                f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker>{escape(after)}</NextMarker></EnumerationResults>"
            )
        if request.method in ("GET", "HEAD"):
            return self._read(request, name)
        if query.get("comp") == "batch":
            return self._batch(request)
        if query.get("comp") == "block":
            self.parts.setdefault(name, {})[query["blockid"]] = request.body
            return Reply(201)
        if query.get("comp") == "blocklist":
            blocks = self.parts.pop(name, {})
            found = re.findall(rb"<(?:Uncommitted|Latest)>([^<]+)<", request.body)
            self.objects[name] = b"".join(blocks[block.decode()] for block in found)
            return Reply(201, {"ETag": etag_of(self.objects[name])})
        if request.method == "PUT":
            self.objects[name] = request.body
            return Reply(201, {"ETag": etag_of(request.body)})
        if request.method == "DELETE":
            return Reply(202 if self.objects.pop(name, None) is not None else 404)
        return Reply(405)

    def _batch(self, request: Request) -> Reply:
        boundary = "batchresponse_1"
        answers = []
        for number, target in enumerate(re.findall(rb"DELETE (\S+) HTTP", request.body)):
            path = unquote(urlsplit(target.decode()).path).lstrip("/")
            name = path if path in self.objects else path.partition("/")[2]
            gone = self.objects.pop(name, None) is not None
            state = "202 Accepted" if gone else "404 The specified blob does not exist."
            answers.append(
                f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
                f"HTTP/1.1 {state}\r\nx-ms-request-id: 1\r\nServer: test\r\n\r\n\r\n"
            )
        body = "".join(answers) + f"--{boundary}--\r\n"
        return Reply(202, {"Content-Type": f"multipart/mixed; boundary={boundary}"}, body.encode())


def _xml(text: str) -> Reply:
    return Reply(200, {"Content-Type": "application/xml"}, f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode())
