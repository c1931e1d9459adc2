"""vLLM's ranks of one node read a checkpoint once: real processes and process groups, around them the fake vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import rdmaload
from tests.support.fake_vllm import FakeVllm, Group, install
from tests.support.servers import RedisServer

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 16 << 10

# A rank as vLLM starts it: the groups first, then the loader. Prints what it read, as JSON.
_RANK = """
    import hashlib, json, logging, sys
    import pytest, redis, torch, torch.distributed as dist
    from tests.support import fake_vllm
    from rdmaload.integrations import metadata
    from rdmaload.integrations.vllm import ranks, register

    rank, tp, pp = (int(sys.argv[i]) for i in (1, 2, 3))
    store, cases = sys.argv[4], json.loads(sys.argv[5])

    class RealGroup(fake_vllm.Group):
        def __init__(self, members):
            super().__init__(members.index(rank), len(members))
            self.members, self.group = members, dist.new_group(members)

        @property
        def cpu_group(self):
            return self.group

        def broadcast_object(self, obj=None, src=0):
            held = [obj]
            dist.broadcast_object_list(held, src=self.members[src], group=self.group)
            return held[0]

    def group_of(groups):
        return [group for group in [RealGroup(m) if rank in m else dist.new_group(m) for m in groups]
                if isinstance(group, RealGroup)][0]

    fake = fake_vllm.install(pytest.MonkeyPatch())
    register()
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=tp * pp)
    across = group_of([[p * tp + t for t in range(tp)] for p in range(pp)])
    along = group_of([[p * tp + t for p in range(pp)] for t in range(tp)])
    fake.set_ranks(tp=across, pp=along)
    def fetched(case):
        with redis.Redis.from_url(case["url"].rpartition("/")[0]) as client:
            return client.info("commandstats")["cmdstat_get"]["calls"]

    for case in cases:
        ranks.place = lambda: case["nodes"][rank]
        loader = fake.loader(**case["options"])
        loader.local_expert_ids = set(case["experts"][rank]) if "experts" in case else None
        config = fake.arg_utils.ModelConfig(case["directory"])
        config.model = case["url"]
        opened = []
        open_ = loader._open
        loader._open = lambda config: opened.append(open_(config)) or opened[-1]
        dist.barrier()
        before = fetched(case)
        dist.barrier()
        weights = {}
        for name, tensor in loader.get_all_weights(config, torch.nn.Module()):
            weights[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        dist.barrier()
        gets = fetched(case) - before
        dist.barrier()
        stats = opened[-1].stats
        group = loader._node_group and loader._node_group[0]
        size, member = (group.size, group.member) if group else (1, 0)
        print(json.dumps([weights, gets, stats.path, stats.fallback_reason, size, member]), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 dense tensors and 8 experts of 10,000 numbers each."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("checkpoint")
    dense = {f"layers.{i}.weight": torch.randn(10_000) for i in range(32)}
    experts = {f"layers.0.experts.{i}.weight": torch.randn(10_000) for i in range(8)}
    save_file(dense | experts, directory / "model.safetensors")
    return directory


@dataclass
class Seen:
    """What one rank says of one load."""

    weights: dict[str, str]
    gets: int
    """Of all ranks."""
    path: str
    fallback_reason: str | None
    group_size: int
    group_member: int


def _run_ranks(tmp_path: Path, tp: int, pp: int, cases: list[dict[str, Any]]) -> list[list[Seen]]:
    """What each rank saw of each case: by case, then by rank."""
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", textwrap.dedent(_RANK), str(rank), str(tp), str(pp)),
                *(str(tmp_path / "store"), json.dumps(cases)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT}", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(tp * pp)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:  # those that wait for one that has failed
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks)
    by_rank = [[Seen(*json.loads(line)) for line in output.splitlines()] for output in outputs]
    return [list(case) for case in zip(*by_rank, strict=True)]


def test_the_ranks_of_a_node_fetch_a_checkpoint_once(server: RedisServer, directory: Path, tmp_path: Path) -> None:
    """Two by two ranks; one start for all cases, as starting Python and torch four times takes longest."""
    url = server.url("llama")
    rdmaload.save(directory, url, chunk_bytes=CHUNK)
    with rdmaload.open(url) as model:
        chunks = sum(-(-file.size // CHUNK) for file in model.files)
    case = {"url": url, "directory": str(directory), "nodes": list("aaaa"), "options": {}}
    together, apart, split, spread = _run_ranks(
        tmp_path,
        2,
        2,
        [
            case,
            {**case, "options": {"read_once": "off"}},
            {**case, "nodes": list("abbb")},
            {**case, "experts": [[0, 1, 2, 3], [4, 5, 6, 7]] * 2},
        ],
    )
    opening = 2 * 5  # manifest and index: by each rank, and before by the one that pins the generation
    every = together[0].weights
    assert len(every) == 40
    for seen in (*together, *apart, *split):
        assert seen.weights == every

    assert chunks < together[0].gets <= chunks + opening
    assert sorted(seen.path for seen in together) == ["node-shared"] * 3 + ["resp-tcp"]
    assert sorted(seen.group_member for seen in together) == [0, 1, 2, 3]

    assert 4 * chunks < apart[0].gets <= 4 * chunks + opening
    assert [seen.path for seen in apart] == ["resp-tcp"] * 4

    assert 2 * chunks < split[0].gets <= 2 * chunks + opening
    assert [seen.group_size for seen in split] == [1, 3, 3, 3]
    assert sorted(seen.group_member for seen in split[1:]) == [0, 1, 2]
    assert split[0].path == "resp-tcp"

    # Dense tensors once for all four, each half of the experts by the two ranks (of two stages) that hold it; a chunk
    # on the border of two tensors is read for both sides.
    dense = {name for name in every if "experts" not in name}
    for seen, own in zip(spread, ([0, 1, 2, 3], [4, 5, 6, 7]) * 2, strict=True):
        names = dense | {f"layers.0.experts.{number}.weight" for number in own}
        assert seen.weights == {name: every[name] for name in names}
    assert spread[0].gets < chunks * 1.5 + opening

    for seen in (*together, *apart, *split, *spread):
        assert seen.fallback_reason is None


def test_a_rank_alone_forms_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: FakeVllm = install(monkeypatch)
    from rdmaload.integrations.vllm import register
    from rdmaload.integrations.vllm.ranks import Ranks

    register()
    assert Ranks.here().node_group() is None
    fake.set_ranks(tp=Group(0, 2))  # the other one is elsewhere
    assert Ranks.here().node_group() is None
