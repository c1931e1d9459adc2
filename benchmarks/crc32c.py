"""Compiles and runs crc32c.cpp: GB/s of each CRC32C implementation that this CPU has, in cache, as JSON."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "crc32c"
        sources = [HERE / "crc32c.cpp", *sorted((CSRC / "core").glob("crc32c*.cpp"))]
        subprocess.run(["g++", "-O2", "-std=c++20", f"-I{CSRC}", *map(str, sources), "-o", str(program)], check=True)
        return subprocess.run([str(program)]).returncode


if __name__ == "__main__":
    sys.exit(main())
