"""What benchmarks/rdma.py makes of ib_write_bw; its measurements need tests/rdma/guest."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import rdma

OUTPUT = """
 #bytes     #iterations    BW peak[MiB/sec]    BW average[MiB/sec]   MsgRate[Mpps]
 1044480    95             0.00               256.00		     0.000257
"""


def answering(*speeds: float) -> Callable[..., float]:
    left = list(speeds)
    return lambda *_: left.pop(0)


def test_the_average_is_read() -> None:
    assert rdma.average_of(OUTPUT) == 256 * 2**20 / 1e9
    assert rdma.average_of("Couldn't connect to 10.77.0.1:18515") is None


def test_a_run_that_is_rated_zero_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma, "one_write_bandwidth", answering(0.0, 0.0, 1.5, 7.0))
    assert rdma.write_bandwidth("rxe0", "10.77.0.1", 1, 1e6) == 1.5


def test_it_is_not_run_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma, "one_write_bandwidth", answering(*[0.0] * rdma.ATTEMPTS))
    with pytest.raises(RuntimeError, match=r"rated 5 runs 0\.00"):
        rdma.write_bandwidth("rxe0", "10.77.0.1", 1, 1e6)
