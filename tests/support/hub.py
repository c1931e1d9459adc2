"""A hub like Hugging Face's, and the store that it redirects to, each a server of its own in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import quote, unquote, urlsplit

from tests.support.s3 import HttpObjects, Reply, Request, honest_reply

__all__ = ["Hub", "Repository"]


@dataclass
class Repository:
    """Revisions by name, each a commit; commits hold files."""

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """A new commit on `branch`; its hash."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.branches[branch] = digest
        return digest


class Hub:
    """`endpoint` is what HF_ENDPOINT would name. Tokens: "good" may read everything, "other" nothing gated or private.

    Files of more than 1,000 bytes lie in the store, whose urls are signed: they expire when `expire` is called, and
    the store refuses a request that brings the hub's token along.
    """

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        self.repositories = dict(repositories)
        self.signature = 0
        self._store = HttpObjects({}, self._from_store)
        self._hub = HttpObjects({}, self._from_hub)
        self.endpoint = self._hub.endpoint

    @property
    def requests(self) -> list[Request]:
        return self._hub.requests

    @property
    def store_requests(self) -> list[Request]:
        return self._store.requests

    def expire(self) -> None:
        """Urls of the store that were given so far are refused from now on."""
        self.signature += 1

    def _from_hub(self, request: Request, _: Reply) -> Reply:
        parts = urlsplit(request.target).path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[4:5] == ["revision"] and len(parts) == 6:
            name, revision, path = "/".join(parts[2:4]), unquote(parts[5]), None
        elif parts[2:3] == ["resolve"] and len(parts) > 4:
            name, revision, path = "/".join(parts[:2]), unquote(parts[3]), unquote("/".join(parts[4:]))
        else:
            return Reply(404)
        repository = self.repositories.get(name)
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in ("", "good", "other"):
            return Reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repository is None or (repository.private and token != "good"):
            return Reply(404 if token == "good" else 401, {"X-Error-Code": "RepoNotFound"})
        if repository.gated and token != "good":
            return Reply(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        commit = repository.branches.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            return Reply(404, {"X-Error-Code": "RevisionNotFound"})
        if path is None:
            return self._described(commit, files)
        content = files.get(path)
        if content is None:
            return Reply(404, {"X-Error-Code": "EntryNotFound"})
        if len(content) > 1000:
            key = f"{commit}/{quote(path)}?signature={self.signature}"
            return Reply(302, {"Location": f"{self._store.endpoint}/{key}", "X-Linked-Etag": '"linked"'})
        return honest_reply(request, content)

    @staticmethod
    def _described(commit: str, files: Mapping[str, bytes]) -> Reply:
        siblings = []
        for path, content in sorted(files.items()):
            entry: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": f"{len(content):040x}"}
            if len(content) > 1000:
                entry["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            siblings.append(entry)
        body = json.dumps({"id": "m", "sha": commit, "siblings": siblings}).encode()
        return Reply(200, {"Content-Type": "application/json"}, body)

    def _from_store(self, request: Request, _: Reply) -> Reply:
        if "authorization" in request.headers:
            return Reply(400, {}, b"<Error><Code>InvalidArgument</Code><Message>Two credentials</Message></Error>")
        if request.query.get("signature") != str(self.signature):
            return Reply(403, {}, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        commit, _, path = request.path.lstrip("/").partition("/")
        found = [
            repository.commits[commit] for repository in self.repositories.values() if commit in repository.commits
        ]
        return honest_reply(request, found[0].get(path) if found else None)

    def close(self) -> None:
        self._hub.close()
        self._store.close()

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
