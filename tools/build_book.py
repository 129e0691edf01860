"""Build the book into _build/html: every chapter runs, every warning is an error.

Outputs of earlier runs are kept only while nothing they depend on has changed; the key covers the
sources, the package, the data, the pinned versions and the size of the run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
DEPENDENCIES = ("notebooks", "x3mat", "data", "constraints.txt", "_config.yml", "_toc.yml", "book")
IGNORED = {"__pycache__", ".ipynb_checkpoints"}


def key() -> str:
    """Hash of all that the outputs in the book depend on."""
    digest = hashlib.sha256(f"{sys.version} {os.environ.get('X3MAT_SMOKE')}".encode())
    for name in DEPENDENCIES:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and not IGNORED & set(file.parts) and file.suffix != ".ipynb":
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def main() -> int:
    os.environ.setdefault("X3MAT_SMOKE", "1")
    stamp, now = BUILD / "x3mat.key", key()
    if not stamp.is_file() or stamp.read_text() != now:
        shutil.rmtree(BUILD, ignore_errors=True)
    start = time.monotonic()
    command = [str(Path(sys.executable).with_name("jupyter-book"))]
    done = subprocess.run(
        [*command, "build", ".", "--all", "-W", "-n", "--keep-going", "--quiet"], cwd=ROOT
    )
    if done.returncode == 0:
        stamp.write_text(now)
        print(f"built in {time.monotonic() - start:.0f} s: {BUILD / 'html' / 'index.html'}")
    else:
        for report in sorted((BUILD / "html" / "reports").rglob("*.log")):
            print(f"--- {report.name}\n{report.read_text()}", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
