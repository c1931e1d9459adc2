"""How small calls are tried again: one rule for every store, and what stores ask for by Retry-After."""

from __future__ import annotations

import email.utils
import threading
import time

import pytest

import rdmaload
from rdmaload.connectors import connector_for
from rdmaload.connectors.http import HttpConnector
from rdmaload.connectors.http_client import HttpClient
from rdmaload.connectors.retries import Refused, Retries, retry_after_seconds
from rdmaload.connectors.s3 import S3Connector
from rdmaload.errors import LoadTimeoutError, NotFoundError, UnavailableError
from rdmaload.options import Options
from tests.support.s3 import HttpObjects, Reply, Request, s3_url


class Pauses(threading.Event):
    """Passes at once and remembers how long it should have been."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        return self.is_set()


def retries(pauses: Pauses, **options: float) -> Retries:
    made = Retries(Options(**options))  # type: ignore[arg-type]
    made._closing = pauses
    return made


def test_pauses_grow_up_to_a_limit() -> None:
    pauses = Pauses()
    left = [UnavailableError("away")] * 10

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert retries(pauses).tried(work) == "done"
    limits = [min(0.05 * 2**attempt, 5) for attempt in range(10)]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses.seconds, limits, strict=True))


def test_a_store_is_left_alone_for_as_long_as_it_asks() -> None:
    pauses = Pauses()
    left = [7.0, 0.0]

    def work() -> str:
        if left:
            raise Refused(UnavailableError("busy"), left.pop(0))
        return "done"

    assert retries(pauses).tried(work) == "done"
    assert pauses.seconds[0] == 7
    assert 0.05 <= pauses.seconds[1] <= 0.1


@pytest.mark.parametrize("failure", [UnavailableError("away"), LoadTimeoutError("late"), NotFoundError("none")])
def test_what_does_not_pass_is_raised_as_it_is(failure: Exception) -> None:
    def work() -> None:
        raise failure

    pauses = Pauses()
    with pytest.raises(type(failure)) as caught:
        retries(pauses, retry_timeout=0.001).tried(work)
    assert caught.value is failure
    assert pauses.seconds == []


def test_who_has_never_answered_is_given_up_after_connect_timeout_and_who_is_busy_is_not() -> None:
    def away() -> None:
        raise UnavailableError("away")

    def busy() -> None:
        raise Refused(UnavailableError("busy"), 3)

    options = {"connect_timeout": 0.001, "retry_timeout": 60.0}
    pauses = Pauses()
    with pytest.raises(UnavailableError):
        retries(pauses, **options).tried(away)
    assert pauses.seconds == []
    made = retries(pauses, **options)
    pauses.wait = lambda timeout=None: pauses.seconds.append(timeout) or len(pauses.seconds) == 3  # type: ignore[func-returns-value, method-assign, assignment, return-value]
    with pytest.raises(UnavailableError, match="busy"):
        made.tried(busy)
    assert pauses.seconds == [3, 3, 3]


def test_a_limit_of_attempts_holds_where_something_below_tries_again() -> None:
    count = 0

    def work() -> None:
        nonlocal count
        count += 1
        raise UnavailableError("away")

    made = Retries(Options(), attempts=3)
    made._closing = Pauses()
    with pytest.raises(UnavailableError):
        made.tried(work)
    assert count == 3


def test_closing_ends_a_pause() -> None:
    made = Retries(Options())

    def work() -> None:
        made.close()
        raise Refused(UnavailableError("busy"), 29)

    with pytest.raises(UnavailableError, match="busy"):
        made.tried(work)
    assert made.closed


def test_retry_after_has_two_forms_and_a_bound() -> None:
    def date(seconds: float) -> str:
        return email.utils.formatdate(time.time() + seconds, usegmt=True)

    for text, seconds in (("0", 0), ("7", 7), ("31", 30), ("9" * 400, 30), (date(3600), 30), (date(-3600), 0)):
        assert retry_after_seconds(text) == seconds
    assert 0 < retry_after_seconds(date(20)) <= 20
    for text in ("", "soon", "-5", "1.5", "٣", "Mon, 99 Foo 2026 00:00:00 GMT"):
        assert retry_after_seconds(text) == 0


def busy_once(header: str) -> tuple[list[Request], object]:
    asked: list[Request] = []

    def answer(request: Request, honest: Reply) -> Reply:
        asked.append(request)
        if len(asked) > 1:
            return honest
        return Reply(503, {"Retry-After": header}, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>")

    return asked, answer


@pytest.mark.parametrize("header", ["17", "Fri, 01 Jan 2100 00:00:00 GMT"])
@pytest.mark.parametrize("kind", ["s3", "http"])
def test_what_stores_ask_for_is_heard(kind: str, header: str) -> None:
    _, answer = busy_once(header)
    pauses = Pauses()
    with HttpObjects({"/bucket/m/config.json": b"{}"}, answer) as server:  # type: ignore[arg-type]
        url = (
            s3_url(server.endpoint, "bucket", "m", addressing_style="path")
            if kind == "s3"
            else f"{server.endpoint}/bucket/m"
        )
        with connector_for(url) as connector:
            if isinstance(connector, S3Connector):
                connector._retries._closing = pauses
            else:
                assert isinstance(connector, HttpConnector)
                assert isinstance(connector._client, HttpClient)
                connector._client._retries._closing = pauses
            assert connector.read_small("config.json") == b"{}"
            assert connector.retries == 1
    assert pauses.seconds == [17 if header == "17" else 30]


def test_a_pause_longer_than_retry_timeout_is_not_waited_for() -> None:
    asked, answer = busy_once("20")
    with HttpObjects({"/bucket/m/config.json": b"{}"}, answer) as server:  # type: ignore[arg-type]
        with pytest.raises(UnavailableError, match="SlowDown"):
            rdmaload.open(s3_url(server.endpoint, "bucket", "m", addressing_style="path"), retry_timeout=15)
        assert len(asked) == 1
