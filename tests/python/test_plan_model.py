"""Plans and loads against a naive model: random tensors, files, chunks, selections and limits.

The model works byte by byte and knows nothing of regions or segments: which bytes of a file are wanted, which are read,
and in how many reads.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdmaload._core import (
    HostArena,
    LoadOperation,
    PlanLimits,
    PythonTransport,
    StoreLayout,
    TensorIndex,
    crc32c,
    plan_into_arenas,
    plan_into_tensors,
)


@dataclass(frozen=True)
class Case:
    sizes: tuple[tuple[int, ...], ...]
    """Bytes of each tensor of each file."""
    chunk_bytes: int
    object_per_chunk: bool
    with_crcs: bool
    whole_chunks: bool
    read_bytes: int
    coalesce_gap: int
    max_arena_bytes: int
    alignment: int
    chosen: int
    """Bit i: tensor i is selected."""
    backwards: bool


class Model:
    """The store of a case, and what the definition of a plan says about it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.index = TensorIndex()
        self.contents: list[bytes] = []
        for number, sizes in enumerate(case.sizes):
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            header = json.dumps(
                {
                    f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [end - size, end]}
                    for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
                }
            ).encode()
            data = bytes((7 * i + 31 * number + (i >> 8)) % 256 for i in range(sum(sizes)))
            content = len(header).to_bytes(8, "little") + header + data
            self.index.add_file(number, f"file {number}", len(content), header)
            self.contents.append(content)
        self.tensors: list[tuple[int, int, int]] = []  # file, begin, end; in the order of the index
        at = {}
        for _, _, _, file, nbytes in self.index.tensors():
            begin = at.get(file, len(self.contents[file]) - sum(case.sizes[file]))
            at[file] = begin + nbytes
            self.tensors.append((file, begin, begin + nbytes))
        self.selection = [i for i in range(len(self.tensors)) if case.chosen >> i & 1]
        if case.backwards:
            self.selection.reverse()

    def chunks(self, file: int) -> list[bytes]:
        content, unit = self.contents[file], self.case.chunk_bytes
        return [content[at : at + unit] for at in range(0, len(content), unit)] if unit else []

    def layout(self) -> StoreLayout:
        files, crcs = [], b""
        for number, content in enumerate(self.contents):
            files.append((f"{number}/", len(content), len(crcs) // 4))
            if self.case.with_crcs:
                crcs += b"".join(crc32c(chunk).to_bytes(4, "little") for chunk in self.chunks(number))
        return StoreLayout(files, self.case.chunk_bytes, self.case.object_per_chunk, crcs)

    def limits(self) -> PlanLimits:
        case = self.case
        return PlanLimits(
            whole_chunks=case.whole_chunks,
            read_bytes=case.read_bytes,
            coalesce_gap=case.coalesce_gap,
            max_arena_bytes=case.max_arena_bytes,
            alignment=case.alignment,
        )

    def object(self, name: str) -> bytes:
        file, _, chunk = name.partition("/")
        return self.chunks(int(file))[int(chunk)] if chunk else self.contents[int(file)]

    def reads(self) -> list[tuple[int, int, int]]:
        """(file, begin, end) of every read, from what is wanted byte by byte."""
        case = self.case
        found = []
        for file, content in enumerate(self.contents):
            wanted = sorted(
                {i for t in self.selection if self.tensors[t][0] == file for i in range(*self.tensors[t][1:])}
            )
            if case.chunk_bytes:
                for chunk in sorted({i // case.chunk_bytes for i in wanted}):
                    begin, end = chunk * case.chunk_bytes, min((chunk + 1) * case.chunk_bytes, len(content))
                    inside = [i for i in wanted if begin <= i < end]
                    found.append((file, begin, end) if case.whole_chunks else (file, inside[0], inside[-1] + 1))
                continue
            runs: list[list[int]] = []
            for i in wanted:
                if runs and i - runs[-1][1] <= case.coalesce_gap:
                    runs[-1][1] = i + 1
                else:
                    runs.append([i, i + 1])
            for begin, end in runs:
                found += [(file, at, min(at + case.read_bytes, end)) for at in range(begin, end, case.read_bytes)]
        return found


def _consistent(case: Case) -> Case:
    """Without chunks there is neither an object per chunk nor a checksum."""
    if case.chunk_bytes:
        return case
    return replace(case, object_per_chunk=False, with_crcs=False)


cases = st.builds(
    Case,
    sizes=st.lists(
        st.lists(st.integers(0, 5) | st.integers(0, 400), max_size=6).map(tuple), min_size=1, max_size=3
    ).map(tuple),
    chunk_bytes=st.sampled_from([0, 0, 16, 64, 100, 257, 4096]),
    object_per_chunk=st.booleans(),
    with_crcs=st.booleans(),
    whole_chunks=st.booleans(),
    read_bytes=st.integers(5, 600),
    coalesce_gap=st.sampled_from([0, 1, 10, 200]),
    max_arena_bytes=st.integers(1, 1500),
    alignment=st.sampled_from([1, 2, 8, 64, 100]),
    chosen=st.integers(0, 2**18 - 1) | st.just(2**18 - 1),
    backwards=st.booleans(),
).map(_consistent)


def execute(model: Model, into_arenas: bool) -> tuple[list[bytes], list[tuple[int, int, int]], dict[str, int]]:
    """The bytes of each selected tensor after the plan was carried out, the reads, and what was counted."""
    limits, layout = model.limits(), model.layout()
    make = plan_into_arenas if into_arenas else plan_into_tensors
    plan = make(model.index, layout, model.selection, limits)
    asked: list[tuple[int, int, int]] = []

    def reader(name: str, offset: int, buffer: memoryview) -> int:
        file, _, chunk = name.partition("/")
        begin = offset + (int(chunk) * model.case.chunk_bytes if chunk else 0)
        asked.append((int(file), begin, begin + len(buffer)))
        data = model.object(name)[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    # A region of no bytes is no memory; one byte more than needed is as good.
    regions = [HostArena(max(1, nbytes)) for nbytes in plan.region_bytes]
    load = LoadOperation(PythonTransport(reader, 1), layout, plan, regions, retry_timeout=1.0)
    load.start()
    assert load.wait_for(60)
    load.throw_if_failed()
    sizes = {tensor: end - begin for tensor, (_, begin, end) in enumerate(model.tensors)}
    placed = {
        tensor: bytes(memoryview(regions[region])[offset : offset + sizes[tensor]])
        for tensor, region, offset in plan.placements()
    }
    check_places(list(plan.placements()), plan.region_bytes, sizes, model.case if into_arenas else None)
    assert plan.reads == len(asked)
    assert plan.read_bytes == sum(end - begin for _, begin, end in asked)
    assert plan.wanted_bytes == sum(sizes[tensor] for tensor in model.selection)
    return [placed[tensor] for tensor in model.selection], sorted(asked), dict(load.counters())  # type: ignore[arg-type]


def check_places(
    placements: Sequence[tuple[int, int, int]], regions: Sequence[int], sizes: dict[int, int], case: Case | None
) -> None:
    """Tensors do not overlap, lie inside, are aligned, and share an arena only while it is small enough."""
    taken: dict[int, list[tuple[int, int]]] = {}
    for tensor, region, offset in placements:
        assert offset + sizes[tensor] <= regions[region]
        taken.setdefault(region, []).append((offset, offset + sizes[tensor]))
        if case is not None:
            assert offset % case.alignment == 0
    for region, spans in taken.items():
        spans = sorted(span for span in spans if span[0] < span[1])
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        assert case is None or len(taken[region]) == 1 or regions[region] <= case.max_arena_bytes
    assert sorted(taken) == list(range(len(regions)))


@settings(max_examples=300, deadline=None)
@given(cases)
@example(Case(((0, 3, 0),), 16, True, True, True, 5, 0, 1, 1, 7, True))
@example(Case(((), (1,)), 0, False, False, True, 5, 0, 1, 64, 1, False))
def test_a_load_gives_the_slices_of_the_files_by_the_reads_of_the_model(case: Case) -> None:
    model = Model(case)
    expected = [model.contents[file][begin:end] for file, begin, end in (model.tensors[t] for t in model.selection)]
    for into_arenas in (True, False):
        loaded, asked, counted = execute(model, into_arenas)
        assert loaded == expected
        assert asked == model.reads()
        verified = sum(
            end - begin
            for file, begin, end in asked
            if case.with_crcs
            and begin % case.chunk_bytes == 0
            and end == min(begin + case.chunk_bytes, len(model.contents[file]))
        )
        assert counted["verified_bytes"] == verified
        assert counted["done_bytes"] == sum(end - begin for _, begin, end in asked)
        assert counted["retries"] == 0
