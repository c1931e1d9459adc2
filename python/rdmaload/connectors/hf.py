"""Models on the Hugging Face Hub, or a server that speaks like it: `hf://organisation/model[@revision]`.

huggingface_hub says where the hub is (HF_ENDPOINT), who we are (HF_TOKEN, the file that `hf auth login` writes) and
what the url of a file is; one request lists the files of a revision, and from then on everything is read at the commit
that it was. Files come through the native transport; the token goes to the hub alone, not to the stores that it
redirects to.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import quote

from rdmaload.connectors.connector import FileInfo
from rdmaload.connectors.http_client import Headers, Response
from rdmaload.connectors.http_files import HttpFiles, is_hidden
from rdmaload.connectors.tls import check_tls_options
from rdmaload.errors import (
    AuthenticationError,
    FormatError,
    NotFoundError,
    NotSupportedError,
    RdmaloadError,
    UnavailableError,
)
from rdmaload.options import Options
from rdmaload.urls import Url

__all__ = ["HfConnector"]

_log = logging.getLogger("rdmaload")

_MAX_ANSWER_BYTES = 256 * 2**20


class HfConnector(HttpFiles):
    """A model on a hub: `hf://org/model`, `hf://org/model@v1.0`, `hf://org/model/folder@refs/pr/1`.

    >>> from rdmaload.urls import parse_url
    >>> with HfConnector(parse_url("hf://org/model@main")) as connector:
    ...     connector
    <HfConnector hf://org/model@main open>
    """

    store_options = frozenset({"headers", "revision"})
    read_only: ClassVar[str] = "models on a hub can be read, not saved; upload a directory by `hf upload`"

    def __init__(self, url: Url, options: Options | None = None) -> None:
        super().__init__(url, options)
        segments = url.model.split("/")
        self._repository = "/".join(segments[:2])
        self._folder = "".join(f"{part}/" for part in segments[2:])
        self._revision = self.options.revision or "main"
        self._hub: Any = None
        self._endpoint = ""
        self._authorization: Headers = ()
        self._commit: str | None = None
        self._known: Mapping[str, _Entry] | None = None  # Guarded by _lock, as is _commit.
        self._listed = False
        with_tls = not (self.options.endpoint_url or "").startswith("http://")
        check_tls_options(self.options, url=self.url, tls=with_tls, write="endpoint_url=https://...")

    @property
    def commit(self) -> str | None:
        """The commit that is read; None before the files were first listed."""
        return self._commit

    def _resolve(self) -> None:
        """Find hub and token, once."""
        self._check_open()
        with self._lock:
            if self._hub is not None:
                return
            try:
                import huggingface_hub
                from huggingface_hub import constants
                from huggingface_hub.utils import build_hf_headers
            except ImportError as err:
                raise NotSupportedError(
                    f"{self.url} needs huggingface_hub: pip install 'rdmaload[hf]'", url=self.url
                ) from err
            if constants.HF_HUB_OFFLINE:
                raise UnavailableError(
                    f"{self.url}: HF_HUB_OFFLINE forbids to ask the hub: unset it, or load a directory that the "
                    "model was downloaded to",
                    url=self.url,
                )
            self._endpoint = (self.options.endpoint_url or constants.ENDPOINT).rstrip("/")
            token: str | bool | None = self.options.read_password(url=self.url) or huggingface_hub.get_token()
            made = build_hf_headers(token=False if self.options.unsigned or not token else token)
            self._authorization = tuple(
                ("Authorization", text) for name, text in made.items() if name.lower() == "authorization"
            )
            self._hub = huggingface_hub

    def request_headers(self) -> Headers:
        self._resolve()
        return (*self._headers, *self._authorization)

    def file_url(self, path: str) -> str:
        self._resolve()
        url: str = self._hub.hf_hub_url(
            self._repository, self._folder + path, revision=self._commit or self._revision, endpoint=self._endpoint
        )
        return url

    # ---- what there is ----

    def read_small(self, path: str) -> bytes | None:
        self._check(path)
        return super().read_small(path) if path in self._tree() else None

    def list_files(self) -> list[FileInfo]:
        tree = {path: entry for path, entry in self._tree().items() if not is_hidden(path)}
        if self._listed:
            self._notice_move()
        self._listed = True
        if not tree:
            raise NotFoundError(
                f"there are no files at {self.url} (commit {self._commit}): check model, revision and folder",
                url=self.url,
            )
        infos = self.infos({path: entry.size for path, entry in tree.items()})
        return [FileInfo(info.path, info.size, tree[info.path].tag or info.etag) for info in infos]

    def _tree(self) -> Mapping[str, _Entry]:
        self._resolve()
        with self._lock:
            known = self._known
        if known is not None:
            return known
        commit, known = self._ask(self._revision)
        with self._lock:
            if self._known is None:
                self._commit, self._known = commit, known
            known = self._known
        _log.info("%s is commit %s", self.url, self._commit)
        return known

    def _notice_move(self) -> None:
        if self._revision == self._commit:
            return
        now, _ = self._ask(self._revision)
        if now != self._commit:
            _log.warning(
                "%s: %s has moved from commit %s to %s since it was opened; the first is read on. Open it again for "
                "the other, or name a commit in the url",
                self.url,
                self._revision,
                self._commit,
                now,
            )

    def _ask(self, revision: str) -> tuple[str, dict[str, _Entry]]:
        """The commit that a revision is, and its files below the folder."""
        url = f"{self._endpoint}/api/models/{quote(self._repository)}/revision/{quote(revision, safe='')}?blobs=true"

        def ask() -> bytes:
            with self._client.request("GET", url, self.request_headers()) as response:
                if response.status != 200:
                    raise self.meaning(response, None)
                return response.read(_MAX_ANSWER_BYTES)

        try:
            answer = json.loads(self.tried(None, ask))
            commit = answer["sha"]
            files = {str(file["rfilename"]): _Entry.of(file) for file in answer["siblings"]}
            if not re.fullmatch("[0-9a-f]{40,64}", commit):
                raise ValueError("the commit is none")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            if isinstance(err, RdmaloadError):
                raise
            raise FormatError(f"{self._endpoint} does not answer as a hub does about {self.url}", url=self.url) from err
        return commit, {
            path[len(self._folder) :]: entry for path, entry in files.items() if path.startswith(self._folder)
        }

    def meaning(self, response: Response, path: str | None) -> RdmaloadError:
        code, status = response.header("x-error-code"), response.status
        page = f"{self._endpoint}/{self._repository}"
        token = "give a token: HF_TOKEN, `hf auth login`, or password_env=NAME"
        given = "the token that was given"
        refused = f"{given} may not read it" if self._authorization else "without a token nobody may read it"
        kind: type[RdmaloadError] = AuthenticationError
        if code == "GatedRepo":
            text = f"it is gated, and {refused}. Accept its conditions at {page}, and {token}"
        elif code == "RevisionNotFound":
            kind, text = NotFoundError, f"it has no branch, tag or commit {self._revision}. See {page}"
        elif code == "EntryNotFound":
            kind, text = NotFoundError, "there is no such file"
        elif code == "RepoNotFound" or status in (401, 404):
            # A hub says the same of a model that is not there and of one that nobody may know of.
            kind = NotFoundError if self._authorization or status == 404 else AuthenticationError
            text = f"there is no such model, or {refused}. Check its name; if it is private, {token}"
            if self._authorization and status == 401:
                kind = AuthenticationError
                text = f"the hub refuses {given} (or there is no such model). Check the name; else {token}"
        elif status == 403:
            text = f"{refused}. See {page}, and {token}"
        else:
            return super().meaning(response, path)
        place = f"{path} in {self.url}" if path else self.url
        return kind(f"{place}: {text} ({status})", url=self.url, key=path)


@dataclass(frozen=True)
class _Entry:
    """A file in a hub's list."""

    size: int | None
    tag: str | None

    @classmethod
    def of(cls, file: Mapping[str, Any]) -> _Entry:
        large = file.get("lfs") or {}
        size = large.get("size", file.get("size"))
        tag = large.get("sha256") or file.get("blobId")
        return cls(size if type(size) is int and size >= 0 else None, f'"{tag}"' if isinstance(tag, str) else None)
