"""The environments of contenders: one each where it is not in the project's own, with torch and numpy from there."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["ENVIRONMENTS", "Environment", "Missing", "python_of", "versions"]

ROOT = Path(__file__).resolve().parents[2]


class Missing(RuntimeError):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Environment:
    """Packages by their exact versions. `bare`: without dependencies, which are those of a GPU or of a whole engine."""

    packages: tuple[str, ...]
    bare: bool = False


ENVIRONMENTS: dict[str, Environment] = {
    "runai": Environment(("runai-model-streamer==0.17.1", "runai-model-streamer-s3==0.17.1")),
    "fastsafetensors": Environment(("fastsafetensors==0.5.0",)),
    "tensorizer": Environment(("tensorizer==2.12.1",)),
    "s3torchconnector": Environment(("s3torchconnector==1.5.0",)),
    "lmcache": Environment(("lmcache==0.5.6",), bare=True),
    "sglang": Environment(("sglang==0.5.23",), bare=True),
    "instanttensor": Environment(("instanttensor==0.2.2",), bare=True),
    "mooncake": Environment(("mooncake-transfer-engine-non-cuda==0.3.13.post1",)),
}


def python_of(name: str | None, directory: Path) -> Path:
    """The interpreter of the environment, set up when it is missing; None is this one."""
    if name is None:
        return Path(sys.executable)
    root = directory / name
    made = root / "made-of"
    environment = ENVIRONMENTS[name]
    wanted = " ".join(environment.packages)
    if not made.exists() or made.read_text() != wanted:
        commands: list[list[object]] = [[sys.executable, "-m", "venv", "--clear", root]]
        install = [root / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        commands.append([*install, *(["--no-deps"] if environment.bare else []), *environment.packages])
        for number, command in enumerate(commands):
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
            if done.returncode != 0:
                raise Missing(f"pip install {wanted} failed: {done.stderr.strip().splitlines()[-1][:300]}")
            if number == 0:  # torch and numpy of the project, after the packages of its own
                site = Path(sysconfig.get_path("platlib", vars={"base": str(root), "platbase": str(root)}))
                (site / "project.pth").write_text(f"{sysconfig.get_path('platlib')}\n")
        made.write_text(wanted)
    return root / "bin" / "python"


def versions() -> dict[str, str]:
    """What is compared, for the report."""
    found = {}
    for package in ("safetensors", "torch", "boto3", "obstore", "redis", "hiredis"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    for environment in ENVIRONMENTS.values():
        found.update(package.split("==") for package in environment.packages)
    return found
