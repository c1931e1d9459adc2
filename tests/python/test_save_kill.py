"""A save that dies anywhere leaves the old model or the new one, and goes on when called again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rdmaload._prune import prune
from rdmaload._save import save
from rdmaload.connectors import connector_for, registry
from rdmaload.connectors.memory import forget_store
from tests.support.servers import RedisServer
from tests.support.stores import Die, Killed, ScriptedConnector, keys_of, read_index, read_model

CHUNK = 2000


def make_source(root: Path, seed: int) -> dict[str, bytes]:
    torch.manual_seed(seed)
    root.mkdir(exist_ok=True)
    save_file({f"layer.{n}": torch.randn(800) for n in range(4)}, root / "model-1.safetensors")
    save_file({"last": torch.randn(1500)}, root / "model-2.safetensors")
    (root / "config.json").write_text(f'{{"seed": {seed}}}')
    (root / "empty.txt").touch()
    (root / "sub").mkdir(exist_ok=True)
    (root / "sub" / "notes.txt").write_bytes(random.Random(seed).randbytes(3 * CHUNK))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def use_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Die], None]:
    """scripted:// urls are memory stores that run their operations through this script."""

    def use(script: Die) -> None:
        cls = type("_Connector", (ScriptedConnector,), {"script": staticmethod(script)})
        monkeypatch.setitem(registry._registered, "scripted", cls)

    return use


def test_killed_at_any_operation_and_run_again(tmp_path: Path, use_script: Callable[[Die], None]) -> None:
    old = make_source(tmp_path / "old", 1)
    new = make_source(tmp_path / "new", 2)
    probe = Die()
    use_script(probe)
    save(tmp_path / "old", "memory://kill/m", chunk_bytes=CHUNK)
    save(tmp_path / "new", "scripted://kill/m", chunk_bytes=CHUNK)
    forget_store("kill")
    operations, kinds = probe.count, set(probe.kinds)
    assert {"get", "set", "exists", "list", "delete", "members_add"} <= kinds
    killed_kinds = set()
    skipped = []
    outcomes = set()
    # The first attempt dies at every operation in turn, the others anywhere.
    for seed in range(max(120, operations)):
        chosen = random.Random(seed)
        store = f"kill-{seed}"
        with_old = chosen.random() < 0.5
        if with_old:
            save(tmp_path / "old", f"memory://{store}/m", chunk_bytes=CHUNK)
        with connector_for(f"memory://{store}/m") as plain:
            places = [1 + seed % operations, *chosen.choices(range(1, operations + 1), k=chosen.choice((0, 0, 1, 2)))]
            for place in places:
                die = Die(place, after=chosen.random() < 0.5)
                use_script(die)
                try:
                    save(tmp_path / "new", f"scripted://{store}/m", chunk_bytes=CHUNK)
                except Killed:
                    killed_kinds.add(die.kinds[-1])
                found = read_model(plain)
                allowed = [new, old if with_old else None]
                assert found in allowed, f"seed {seed}"
                outcomes.add(allowed.index(found))
            stats = save(tmp_path / "new", f"memory://{store}/m", chunk_bytes=CHUNK)
            assert stats.published
            skipped.append(stats.skipped_bytes)
            assert read_model(plain) == new, f"seed {seed}"
            # Nothing of the dead attempts stays, except what prune removes.
            assert not [key for key in keys_of(plain) if key.startswith("m/saving/")]
            prune(f"memory://{store}/m", force=True)
            assert read_model(plain) == new
            found_index = read_index(plain)
            assert found_index is not None
            extra = [key for key in keys_of(plain) if found_index[0].generation not in key]
            assert extra == ["m/manifest"], f"seed {seed}"
            assert len(keys_of(plain)) == 3 + found_index[1].total_chunks, f"seed {seed}"
        forget_store(store)
    assert outcomes == {0, 1}
    assert killed_kinds == kinds
    total = sum(len(content) for content in new.values())
    assert 0 in skipped
    assert any(0 < count < total for count in skipped)


def test_a_source_that_changed_after_a_kill_is_saved_anew(
    tmp_path: Path, use_script: Callable[[Die], None], model: str
) -> None:
    source = tmp_path / "source"
    make_source(source, 1)
    url = f"memory://changed/{model}"
    for explicit in (None, "step-1"):
        probe = Die()
        use_script(probe)
        save(source, f"scripted://changed-probe/{explicit}", chunk_bytes=CHUNK, save_id=explicit)
        use_script(Die(probe.count - 15))
        with pytest.raises(Killed):
            save(source, f"scripted://changed/{model}", chunk_bytes=CHUNK, save_id=explicit)
        (source / "config.json").write_text(f'{{"changed": "{explicit}"}}')
        torch.manual_seed(7)
        save_file({"last": torch.randn(1500)}, source / "model-2.safetensors")
        stats = save(source, url, chunk_bytes=CHUNK, save_id=explicit)
        files = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()}
        # With its own id nothing of the other content is reused, with a given one what is the same.
        assert (stats.skipped_bytes > 0) == (explicit is not None)
        with connector_for(url) as plain:
            assert read_model(plain) == files


def test_a_real_process_killed_by_a_signal(tmp_path: Path, redis_server: RedisServer, model: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    torch.manual_seed(3)
    for number in range(8):
        save_file({f"w{number}": torch.randn(500_000)}, source / f"model-{number}.safetensors")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    url = redis_server.url(model)
    script = textwrap.dedent(
        f"""
        from rdmaload._save import save
        print("ready", flush=True)
        save({str(source)!r}, {url!r}, chunk_bytes=5_000, connections=1)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with connector_for(url) as plain:

        def keys(part: str) -> int:
            return sum(part in key for key in plain.list(f"{model}/"))

        for _ in range(4):
            # Not a time but a number of chunks (of 3,200), so that it is in the middle on any machine.
            wanted = keys("/chunks/") + 500
            with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                deadline = time.monotonic() + 30
                while process.poll() is None and time.monotonic() < deadline and keys("/chunks/") < wanted:
                    pass
                process.send_signal(signal.SIGKILL)
            assert read_model(plain) in (None, files)
        finished = keys("/journal/")
        stats = save(source, url, chunk_bytes=5_000)
        assert read_model(plain) == files
        assert stats.published
        assert (stats.skipped_bytes > 0) == (finished > 0)
