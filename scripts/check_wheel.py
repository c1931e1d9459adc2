"""Whether the repaired wheels in a directory are what is promised: their tag, what they hold; they bundle nothing.

    check_wheel.py DIRECTORY [OLDEST]

OLDEST is the newest manylinux tag that will do, such as manylinux_2_35; nothing newer may be needed to run a wheel.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

_EXPECTED = ("rdmaload/__init__.py", "rdmaload/py.typed", "rdmaload/_core.pyi", "rdmaload/cli/parser.py")
_MOST_BYTES = 20 << 20


def problems(wheel: Path, oldest: tuple[int, int]) -> list[str]:
    """What is wrong with one wheel."""
    found = []
    tags = re.findall(r"manylinux_(\d+)_(\d+)_(?:x86_64|aarch64)", wheel.name)
    if not tags:
        found.append("it has no manylinux tag: auditwheel did not repair it")
    elif min((int(major), int(minor)) for major, minor in tags) > oldest:
        found.append(f"it needs a newer glibc than {oldest[0]}.{oldest[1]}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    found += [f"it lacks {name}" for name in _EXPECTED if name not in names]
    if sum(re.fullmatch(r"rdmaload/_core\.[^/]*\.so", name) is not None for name in names) != 1:
        found.append("it does not hold the extension exactly once")
    for name in names:
        if ".so" in name and not name.startswith("rdmaload/_core."):
            # Not even OpenSSL: like every library of a device, it is opened at run time, the system's own.
            found.append(f"it bundles {name}, which nobody asked for")
        if not re.match(r"rdmaload(/|\.libs/|-[^/]*\.dist-info/)", name):
            found.append(f"it installs {name} outside of its package")
    if wheel.stat().st_size > _MOST_BYTES:
        found.append(f"it has {wheel.stat().st_size} bytes")
    return found


def main() -> int:
    directory = Path(sys.argv[1])
    matched = re.fullmatch(r"manylinux_(\d+)_(\d+)", sys.argv[2] if len(sys.argv) > 2 else "manylinux_2_28")
    assert matched is not None, "OLDEST is written like manylinux_2_28"
    oldest = int(matched[1]), int(matched[2])
    wheels = sorted(directory.glob("*.whl"))
    wrong = [f"{wheel.name}: {problem}" for wheel in wheels for problem in problems(wheel, oldest)]
    for line in wrong or [f"as promised: {wheel.name}" for wheel in wheels]:
        print(line, file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong or not wheels else 0


if __name__ == "__main__":
    sys.exit(main())
