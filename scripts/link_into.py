"""Makes this checkout importable in another environment of the same Python, entry points included, without a build.

    python scripts/link_into.py OTHER/bin/python

Run it with the Python of an environment that has rdmaload (`pip install -e .`): its extension is used there, too.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import rdmaload
from rdmaload import _core

if sys.version_info >= (3, 11):
    import tomllib
else:
    raise SystemExit("link_into.py needs Python 3.11")

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Links in a package directory, and a distribution's metadata beside it."""
    show = "import sys, sysconfig; print(sysconfig.get_path('platlib'), sys.version_info[:2])"
    site_text, _, version = subprocess.check_output([sys.argv[1], "-c", show], text=True).strip().partition(" ")
    if version != str(sys.version_info[:2]):
        raise SystemExit(f"{sys.argv[1]} is Python {version}, the extension was built for {sys.version_info[:2]}")
    site = Path(site_text)
    package = site / "rdmaload"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir()
    for entry in (ROOT / "python" / "rdmaload").iterdir():
        if entry.name != "__pycache__" and entry.suffix != ".so":
            (package / entry.name).symlink_to(entry)
    extension = Path(str(_core.__file__))
    (package / extension.name).symlink_to(extension.resolve())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = site / f"rdmaload-{rdmaload.__version__}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rdmaload\nVersion: {rdmaload.__version__}\n")
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
