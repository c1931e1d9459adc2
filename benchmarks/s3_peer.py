"""One load by another S3 client, measured by itself: run by s3.py in an environment that has the clients.

python s3_peer.py CLIENT ENDPOINT BUCKET [DUMP] < lines of "key size"

Each client is used the fastest way that it has; those that fill the caller's memory get fresh memory with huge pages,
as rdmaload takes for itself. Prints one line of JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

RANGE_BYTES = 64 * 2**20
Objects = list[tuple[str, int]]


def memory(nbytes: int) -> memoryview:
    found = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(found)


def boto3(endpoint: str, bucket: str, objects: Objects) -> Callable[[], list[memoryview]]:
    """get_object of ranges, readinto, on two threads."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        config=Config(signature_version=UNSIGNED, s3={"addressing_style": "path"}),
    )

    def load() -> list[memoryview]:
        views = [memory(size) for _, size in objects]

        def fetch(task: tuple[int, int]) -> None:
            number, start = task
            key, size = objects[number]
            end = min(size, start + RANGE_BYTES)
            body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")["Body"]
            while start < end:
                start += body.readinto(views[number][start:end])

        tasks = [(number, at) for number, (_, size) in enumerate(objects) for at in range(0, size, RANGE_BYTES)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fetch, tasks))
        return views

    return load


def crt(endpoint: str, bucket: str, objects: Objects) -> Callable[[], list[memoryview]]:
    """The client in C that boto3's transfers take where awscrt is installed, copied to its place from its callback.

    s3transfer's own way around it can only write files, or go through a queue of Python; this is the faster use.
    """
    from awscrt import http, io, s3

    bootstrap = io.ClientBootstrap(io.EventLoopGroup(2), io.DefaultHostResolver(io.EventLoopGroup(1)))
    client = s3.S3Client(
        bootstrap=bootstrap,
        region="us-east-1",
        tls_mode=s3.S3RequestTlsMode.DISABLED,
        part_size=8 * 2**20,
        throughput_target_gbps=100.0,
    )
    host = endpoint.removeprefix("http://")

    def load() -> list[memoryview]:
        views = [memory(size) for _, size in objects]

        def into(view: memoryview) -> Callable[..., None]:
            def on_body(chunk: bytes, offset: int, **_: object) -> None:
                view[offset : offset + len(chunk)] = chunk

            return on_body

        running = [
            client.make_request(
                type=s3.S3RequestType.GET_OBJECT,
                request=http.HttpRequest("GET", f"/{bucket}/{key}", http.HttpHeaders([("host", host)])),
                on_body=into(view),
            )
            for (key, _), view in zip(objects, views, strict=True)
        ]
        for request in running:
            request.finished_future.result()
        return views

    return load


def obstore(endpoint: str, bucket: str, objects: Objects) -> Callable[[], list[memoryview]]:
    """get_range on four threads, copied into one piece of memory per object."""
    import obstore as library
    from obstore.store import S3Store

    store = S3Store(
        bucket,
        endpoint=endpoint,
        region="us-east-1",
        skip_signature=True,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )

    def load() -> list[memoryview]:
        views = [memory(size) for _, size in objects]

        def fetch(task: tuple[int, int]) -> None:
            number, start = task
            key, size = objects[number]
            end = min(size, start + RANGE_BYTES)
            views[number][start:end] = memoryview(library.get_range(store, key, start=start, end=end))

        tasks = [(number, at) for number, (_, size) in enumerate(objects) for at in range(0, size, RANGE_BYTES)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(fetch, tasks))
        return views

    return load


def s3torchconnector(endpoint: str, bucket: str, objects: Objects) -> Callable[[], list[memoryview]]:
    """The range-based reader, readinto, on two threads."""
    from s3torchconnector._s3client import S3Client, S3ClientConfig
    from s3torchconnector.s3reader import S3ReaderConstructor

    client = S3Client(
        "us-east-1", endpoint=endpoint, s3client_config=S3ClientConfig(unsigned=True, force_path_style=True)
    )
    constructor = S3ReaderConstructor.range_based()

    def load() -> list[memoryview]:
        views = [memory(size) for _, size in objects]

        def fetch(number: int) -> None:
            key, size = objects[number]
            reader = client.get_object(bucket, key, reader_constructor=constructor)
            done = 0
            while done < size:
                done += reader.readinto(views[number][done : min(size, done + RANGE_BYTES)])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fetch, range(len(objects))))
        return views

    return load


def runai(endpoint: str, bucket: str, objects: Objects) -> Callable[[], list[memoryview]]:
    """The streamer's tensors, cloned so that they outlive its buffer, as an engine needs them."""
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_REGION="us-east-1",
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="y",
        AWS_EC2_METADATA_DISABLED="true",
        RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING="0",
        RUNAI_STREAMER_CONCURRENCY="4",
        RUNAI_STREAMER_MEMORY_LIMIT="-1",
    )
    from runai_model_streamer import SafetensorsStreamer

    def load() -> list[memoryview]:
        kept = []
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([f"s3://{bucket}/{key}" for key, _ in objects])
            for _, tensor in streamer.get_tensors():
                kept.append(tensor)
        load.kept = kept  # type: ignore[attr-defined]
        return []

    return load


CLIENTS = {"boto3": boto3, "crt": crt, "obstore": obstore, "s3torchconnector": s3torchconnector, "runai": runai}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    name, endpoint, bucket = sys.argv[1:4]
    objects = [(line.split()[0], int(line.split()[1])) for line in sys.stdin]
    load = CLIENTS[name](endpoint, bucket, objects)
    cpu, start = cpu_seconds(), time.perf_counter()
    views = load()
    answer = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
    if len(sys.argv) > 4:
        with open(sys.argv[4], "wb") as dump:
            for view in views:
                dump.write(view)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
