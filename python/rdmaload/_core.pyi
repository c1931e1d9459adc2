# The extension module; kept in step with csrc/bindings by tests/python/test_core_stub.py.
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypedDict

from typing_extensions import Buffer, CapsuleType

def crc32c(data: Buffer, value: int = 0) -> int: ...
def crc32c_combine(a: int, b: int, length_b: int) -> int: ...
def crc32c_implementation() -> str: ...
def crc(kind: str, data: Buffer, value: int = 0) -> int: ...
def crc_combine(kind: str, a: int, b: int, length_b: int) -> int: ...

class HostArena(Buffer):
    def __init__(self, nbytes: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def tensor(self, offset: int, code: int, bits: int, shape: Sequence[int]) -> CapsuleType: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class ImportedTensor:
    def __init__(self, capsule: CapsuleType) -> None: ...
    @property
    def nbytes(self) -> int: ...

class LentBuffer(Buffer):
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Transport:
    @property
    def path(self) -> str: ...
    @property
    def fallback_reason(self) -> str: ...
    @property
    def keeps_digests(self) -> bool: ...
    @property
    def description(self) -> str: ...
    @property
    def connections(self) -> int: ...

def is_local_disk(fd: int) -> bool: ...

class FileTransport(Transport):
    def __init__(self, *, root: str, threads: int, io: str = "auto") -> None: ...

class MemoryTransport(Transport):
    def __init__(self, *, threads: int) -> None: ...
    def put(self, object: str, buffer: Buffer) -> None: ...

def tls_library() -> str: ...

class TlsContext:
    def __init__(
        self,
        *,
        ca_file: str = "",
        ca_dir: str = "",
        client_cert_file: str = "",
        client_key_file: str = "",
        server_name: str = "",
        verify: bool = True,
    ) -> None: ...

class RespTransport(Transport):
    def __init__(
        self,
        *,
        host: str,
        port: int,
        username: str | None = None,
        password: str | None = None,
        db: int = 0,
        protocol: int = 2,
        connections: int = 2,
        bytes_in_flight: int = ...,
        connect_timeout: float = 10.0,
        inactivity_timeout: float = 30.0,
        name: str = "redis",
        socket_path: str = "",
        tls: TlsContext | None = None,
    ) -> None: ...

class RdmaTransport(Transport):
    def __init__(
        self,
        *,
        host: str,
        port: int,
        tcp_port: int,
        fall_back: bool,
        device: str = "",
        username: str | None = None,
        password: str | None = None,
        db: int = 0,
        protocol: int = 2,
        connections: int = 4,
        bytes_in_flight: int = ...,
        connect_timeout: float = 10.0,
        inactivity_timeout: float = 30.0,
        name: str = "rdma",
    ) -> None: ...

def rdma_way(
    *,
    host: str,
    port: int,
    device: str = "",
    username: str | None = None,
    password: str | None = None,
    db: int = 0,
    protocol: int = 2,
    connect_timeout: float = 10.0,
    name: str = "rdma",
) -> str: ...

class HttpTransport(Transport):
    def __init__(
        self,
        addresses: Callable[[str, bool], tuple[str, Sequence[tuple[str, str]], str, str, str, float | None]],
        *,
        connections: int = 8,
        connect_timeout: float = 10.0,
        inactivity_timeout: float = 30.0,
        stall_timeout: float = 2.0,
        tls: TlsContext | Callable[[], TlsContext] | None = None,
        name: str = "http",
    ) -> None: ...

class CachingTransport(Transport):
    def __init__(
        self,
        source: Transport,
        *,
        directory: str,
        limit_bytes: int | None,
        block_bytes: int,
        object_per_block: bool,
        entries: Sequence[tuple[str, int, int, str, str]],
        crcs: Buffer,
        threads: int,
        io: str = "auto",
        patience: float = 30.0,
    ) -> None: ...

class PythonTransport(Transport):
    def __init__(self, reader: Callable[[str, int, memoryview], int], threads: int) -> None: ...

class StagedTransport(Transport):
    def __init__(
        self,
        source: Transport,
        *,
        device: int,
        read_bytes: int,
        staging_bytes: int,
        expected_bytes: int,
        block_bytes: int = ...,
        verify_device: bool = False,
        trace: bool = False,
    ) -> None: ...
    def follow(self, stream: int) -> None: ...
    def lead(self, stream: int) -> None: ...
    @property
    def stream(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def no_kernels_reason(self) -> str: ...
    def staging_counters(self) -> dict[str, int]: ...
    def trace(self) -> list[tuple[float, float, float, int]]: ...

class GdsTransport(Transport):
    def __init__(
        self,
        files: FileTransport,
        staged: StagedTransport,
        *,
        device: int,
        read_bytes: int,
        device_bytes: int,
        verify_device: bool = False,
    ) -> None: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def verified_bytes(self) -> int: ...

class RdmaDeviceTransport(Transport):
    def __init__(
        self, network: RdmaTransport, staged: StagedTransport, *, device: int, verify_device: bool = False
    ) -> None: ...
    @property
    def verified_bytes(self) -> int: ...
    def follow(self, stream: int) -> None: ...

class DeviceDestination:
    def __init__(self, pointer: int, nbytes: int, owner: object) -> None: ...
    @property
    def nbytes(self) -> int: ...

def open_cuda_driver(library: str, kernels: bytes = b"") -> None: ...
def set_cufile_library(library: str) -> None: ...
def cufile_refusal() -> str: ...
def release_pinned_memory() -> None: ...
def cuda_device_count() -> int: ...
def cuda_driver_info() -> dict[str, str | int | bool]: ...
def kernels_refusal(device: int) -> str: ...
def convert_on_device(
    device: int, source: int, source_type: str, target: int, target_type: str, count: int, stream: int
) -> bool: ...

class _Gid(TypedDict):
    index: int
    address: str
    type: str
    netdev: str

class _CardPort(TypedDict):
    number: int
    state: str
    link_layer: str
    rate: str
    gbit_per_s: float
    gids: list[_Gid]

class _Card(TypedDict):
    name: str
    node_type: str
    firmware: str
    pci_path: str
    numa_node: int
    netdevs: list[str]
    usable: bool
    ports: list[_CardPort]

class _Probe(TypedDict):
    name: str
    ok: bool
    required: bool
    detail: str
    next_step: str

def rdma_cards(sysfs: str = "/sys") -> list[_Card]: ...
def rdma_cards_by_distance(pci_address: str, sysfs: str = "/sys") -> list[tuple[str, str, int]]: ...
def rdma_route(host: str, port: int) -> tuple[str, str, str] | None: ...
def cuda_pci_address(device: int) -> str: ...
def memlock_limit() -> int | None: ...
def rdma_probe(
    *, host: str = "", port: int = 6379, device: str = "", sysfs: str = "/sys", dev: str = "/dev"
) -> list[_Probe]: ...

class TensorIndex:
    def __init__(self) -> None: ...
    def add_file(self, file: int, path: str, file_bytes: int, header: Buffer) -> None: ...
    def add_single(
        self, file: int, path: str, file_bytes: int, header: Buffer, stored_name: str, name: str
    ) -> None: ...
    def add_blocks(self, file: int, file_bytes: int, block_bytes: int) -> None: ...
    def __len__(self) -> int: ...
    def duplicate(self) -> tuple[str, int, int] | None: ...
    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]: ...

class StoreLayout:
    def __init__(
        self,
        files: Sequence[tuple[str, int, int]],
        chunk_bytes: int,
        object_per_chunk: bool,
        crcs: Buffer,
        digests: Sequence[str] = [],
    ) -> None: ...

class PlanLimits:
    def __init__(
        self,
        *,
        whole_chunks: bool = True,
        read_bytes: int = ...,
        coalesce_gap: int = ...,
        max_arena_bytes: int = ...,
        alignment: int = 64,
    ) -> None: ...

class LoadPlan:
    @property
    def region_bytes(self) -> list[int]: ...
    @property
    def wanted_bytes(self) -> int: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def files(self) -> list[int]: ...
    @property
    def reads(self) -> int: ...
    @property
    def segments(self) -> int: ...
    def placements(self) -> Iterator[tuple[int, int, int]]: ...
    def exports(
        self, index: TensorIndex, arenas: Sequence[HostArena], types: Mapping[str, tuple[int, int]]
    ) -> Iterator[tuple[int, int, int, str, object | None]]: ...

def files_of_weight_map(text: Buffer) -> set[str]: ...
def plan_into_arenas(
    index: TensorIndex, layout: StoreLayout, selection: Sequence[int], limits: PlanLimits
) -> LoadPlan: ...
def plan_into_tensors(
    index: TensorIndex, layout: StoreLayout, selection: Sequence[int], limits: PlanLimits
) -> LoadPlan: ...

class _Counters(TypedDict):
    done_bytes: int
    verified_bytes: int
    unverified_bytes: int
    copied_bytes: int
    cached_bytes: int
    retries: int
    checksum_seconds: float
    seconds: float

# Submitted, taken by a thread, first byte, received in host memory, done (seconds as of time.perf_counter(), None where
# the transport does not say); checksum seconds; thread, file, offset, bytes, attempt, success.
_ReadTrace = tuple[float, float | None, float | None, float | None, float, float, int, int, int, int, int, bool]

class LoadOperation:
    def __init__(
        self,
        transport: Transport,
        layout: StoreLayout,
        plan: LoadPlan,
        destinations: Sequence[HostArena | ImportedTensor | DeviceDestination],
        *,
        verify: bool = True,
        max_integrity_attempts: int = 3,
        retry_timeout: float = 60.0,
        timeout: float | None = None,
        queued_bytes: int | None = None,
        trace: bool = False,
    ) -> None: ...
    def start(self) -> None: ...
    def wait_for(self, seconds: float) -> bool: ...
    def cancel(self) -> None: ...
    def throw_if_failed(self) -> None: ...
    @property
    def failed_object(self) -> str: ...
    def unfinished_regions(self) -> list[int]: ...
    def finished_files(self) -> list[int]: ...
    def counters(self) -> _Counters: ...
    def trace(self) -> list[_ReadTrace]: ...
    def digests(self) -> list[tuple[int, int, int, int]]: ...

class _ServerCounters(TypedDict):
    connections_accepted: int
    connections_refused: int
    connections_now: int
    connections_stalled: int
    commands: int
    errors: int
    hits: int
    misses: int
    bytes_received: int
    bytes_sent: int
    bytes_by_reference: int
    refused_for_memory: int
    auth_failures: int
    auth_refused: int
    tls_failures: int
    files_failed: int
    rdma_connections_now: int
    rdma_reads: int
    rdma_work_requests: int
    rdma_direct_bytes: int
    rdma_copied_bytes: int
    registered_bytes: int
    keys: int
    values: int
    used_bytes: int
    held_bytes: int
    limit_bytes: int

class WeightStore:
    def __init__(self, limit_bytes: int) -> None: ...
    def export_file(self, *, prefix: str, path: str, size: int, mtime_ns: int, chunk_bytes: int) -> None: ...
    def export_copies(self, *, prefix: str, to: str, count: int) -> None: ...
    def export_value(self, key: str, content: bytes) -> None: ...
    def set_value(self, key: str, content: bytes) -> None: ...
    def unlock(self, keys: list[str]) -> None: ...
    def add_name(self, key: str, name: str) -> None: ...

class WeightServer:
    def __init__(
        self,
        store: WeightStore,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        password: str | None = None,
        threads: int = 2,
        max_connections: int = 10000,
        stall_timeout: float = 120.0,
        version: str = "",
        tls: tuple[str, str, str] | None = None,
        rdma_host: str | None = None,
        rdma_port: int | None = None,
        rdma_max_connections: int = 1024,
    ) -> None:
        """`tls`: files of certificate, key ("": in the certificate's) and authority of clients ("": none asked)."""
    @property
    def port(self) -> int: ...
    @property
    def rdma_port(self) -> int: ...
    @property
    def counters(self) -> _ServerCounters: ...
    def wait(self, seconds: float) -> bool: ...
    def take_log(self) -> list[str]: ...
    def close(self) -> None: ...
