"""A load over RDMA against `ib_write_bw` on the same card: how much of it is left.

    tests/rdma/guest -m 6144 -t 900 -- python -m benchmarks.rdma --total-bytes 100e6 --pairs 7

Both ends run on this machine, as the server of rdmaload does: `ib_write_bw` (Debian's perftest) writes messages of a
chunk's size from one process to another, which do nothing with them; rdmaload's server writes chunks into tensors whose
checksums the client computes. Needs an RDMA card with an address, or tests/rdma/guest.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rdmaload
from benchmarks import checkpoints, paired
from rdmaload import _core
from tests.support.weight_server import WeightServer

CHUNK_BYTES = 2**20 - 4096
PATIENCE = {"connect_timeout": 100.0, "inactivity_timeout": 120.0}
READY_SECONDS = 30.0
ATTEMPTS = 5  # of ib_write_bw, for one number


def write_bandwidth(card: str, address: str, queue_pairs: int, total_bytes: float) -> float:
    """GB/s of ib_write_bw, which polls busily: it has no events for writes. A run that it rates 0.00 is run again."""
    for _ in range(ATTEMPTS):
        speed = one_write_bandwidth(card, address, queue_pairs, total_bytes)
        if speed > 0:
            return speed
    raise RuntimeError(f"ib_write_bw rated {ATTEMPTS} runs 0.00 MiB/s: more --total-bytes may help")


def one_write_bandwidth(card: str, address: str, queue_pairs: int, total_bytes: float) -> float:
    messages = max(5, int(total_bytes / CHUNK_BYTES / queue_pairs))
    command = [
        "ib_write_bw",
        "-d",
        card,
        "-s",
        str(CHUNK_BYTES),
        "-n",
        str(messages),
        "-q",
        str(queue_pairs),
        "-F",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            client = subprocess.run([*command, address], capture_output=True, text=True, timeout=300, check=False)
            speed = average_of(client.stdout)
            if speed is not None:
                return speed
            if time.monotonic() > deadline or server.poll() is not None:
                raise RuntimeError(f"ib_write_bw: {client.stdout[-300:]} {client.stderr[-300:]}")
            time.sleep(0.2)  # the server does not listen yet
    finally:
        server.terminate()
        server.communicate()


def average_of(output: str) -> float | None:
    """GB/s of the row "bytes, iterations, peak, average MiB/s, messages"; None where there is none."""
    row = re.search(rf"^\s*{CHUNK_BYTES}\s+\d+\s+[\d.]+\s+([\d.]+)", output, re.MULTILINE)
    return None if row is None else float(row[1]) * 2**20 / 1e9


def load_speed(url: str, directory: Path | None, **options: object) -> tuple[float, rdmaload.LoadStats]:
    """GB/s of one load; with a directory, after its bytes were compared with that."""
    stats = rdmaload.LoadStats()
    begin = time.perf_counter()
    state = rdmaload.load(url, stats=stats, **PATIENCE, **options)
    seconds = time.perf_counter() - begin
    if directory is not None:
        checkpoints.compare(state, directory)
    if stats.path != "resp-rdma" or stats.copied_bytes != 0:
        raise RuntimeError(f"not what is measured: {stats.path}, {stats.copied_bytes} bytes copied")
    return stats.bytes / seconds / 1e9, stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-bytes", type=float, default=100e6)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--connections", type=int, default=2, help="of rdmaload, and queue pairs of ib_write_bw")
    parser.add_argument("--address", default="10.77.0.1", help="the card's own (the default is the guest's)")
    parser.add_argument("--card", help="default: the one that the address belongs to")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if shutil.which("ib_write_bw") is None:
        sys.exit("ib_write_bw is missing: apt-get install perftest")
    route = _core.rdma_route(arguments.address, 6379)
    card = arguments.card or (route[2] if route else "")
    if not card:
        sys.exit(f"{arguments.address} belongs to no RDMA card (tests/rdma/guest has one)")

    runs: dict[str, list[float]] = {"ib_write_bw": [], "rdmaload": [], "rdmaload, verify=off": []}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        checkpoints.llama_like(directory, arguments.total_bytes, files=2)
        with WeightServer(rdma=arguments.address, max_memory=int(4 * arguments.total_bytes)) as server:
            rdmaload.save(directory, server.url("m"))
            url = server.rdma_url("m", connections=arguments.connections)
            load_speed(url, directory)
            for pair in range(arguments.pairs):
                names = list(runs) if pair % 2 == 0 else list(reversed(runs))
                for name in names:
                    if name == "ib_write_bw":
                        speed = write_bandwidth(card, arguments.address, arguments.connections, arguments.total_bytes)
                    else:
                        speed, _ = load_speed(url, None, verify="off" if "off" in name else "auto")
                    runs[name].append(speed)
                paired.say(f"pair {pair + 1}: " + ", ".join(f"{name} {runs[name][-1]:.3f} GB/s" for name in runs))

    rows = []
    result: dict[str, object] = {"card": card, "connections": arguments.connections, "runs": runs}
    for name, speeds in runs.items():
        shares = [mine / limit for mine, limit in zip(speeds, runs["ib_write_bw"], strict=True)]
        low, high = paired.bootstrap_interval(shares)
        share = statistics.median(shares)
        result[name] = {"share": share, "interval": [low, high], "gb_per_s": statistics.median(speeds)}
        rows.append((name, f"{statistics.median(speeds):.3f}", f"{min(speeds):.3f} to {max(speeds):.3f}"))
        rows[-1] += (f"{share:.2f} ({low:.2f} to {high:.2f})",)
    paired.say(paired.table([("way", "median GB/s", "all", "share of ib_write_bw"), *rows]))
    paired.report("rdma", result, arguments.json)


if __name__ == "__main__":
    main()
