"""Result files: JSON below ``data/results`` with its provenance, written atomically."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import paths
from .errors import DataError

_PACKAGES = ("x3mat", "numpy", "scipy", "torch", "e3nn", "lightning", "pymatgen", "spglib", "ase",
             "zeose", "core-mof", "raspalib", "scikit-learn", "numba", "numba-cuda")


def versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Installed versions of Python and of those of `packages` that are present."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> str:
    """Processor, its number of cores, and the GPU where torch is loaded and sees one."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):  # other systems than Linux have no such file
        found = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1].strip() if found else model
    text = f"{model}, {os.cpu_count()} cores"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        text += f"; {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return text


def git_revision() -> str | None:
    """Commit of the repository, with ``+`` if tracked files differ from it; None outside one."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    with suppress(OSError, subprocess.SubprocessError):
        if root := paths.root():
            return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True,
                                  timeout=20).stdout.strip()
    return None


def provenance(*, seed: int | list[int] | None, command: str, wall_s: float) -> dict[str, Any]:
    """Where a number comes from: command, seed, versions, hardware, wall time (s), date, commit."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"command": command, "seed": seed, "versions": versions(), "hardware": hardware(),
            "wall_s": round(float(wall_s), 3), "date": date, "git": git_revision()}


def plain(value: Any) -> Any:
    """`value` with numpy scalars and arrays turned into Python's, non-finite numbers into None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new file for `path`: a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, payload: Any) -> Path:
    """Write `payload` as JSON, atomically."""
    text = json.dumps(plain(payload), indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())
    return Path(path)


def write(relative_path: str | Path, payload: dict[str, Any], *, seed: int | list[int] | None,
          command: str, wall_s: float) -> Path:
    """Write `payload`, as "provenance" with its :func:`provenance`, below ``data/results``.

    `payload` is what :func:`plain` makes JSON of, `seed` that of everything random (None if nothing
    was), `command` what writes the file again, `wall_s` the wall time in seconds. Returns its path.
    """
    full = {**payload, "provenance": provenance(seed=seed, command=command, wall_s=wall_s)}
    return write_json(paths.results(relative_path), full)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a DataError says that it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        cause, remedy = "the file is missing", "Run the command or tool that writes it."
    except json.JSONDecodeError as error:
        cause, remedy = f"it is not valid JSON ({error})", "Restore it or write it again."
    raise DataError(path, cause, remedy)


def read(relative_path: str | Path) -> dict[str, Any]:
    """Read a JSON result file below ``data/results``; raises `DataError` like `read_json`."""
    return read_json(paths.results(relative_path))
