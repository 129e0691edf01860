"""Where data lies: the repository's (or wheel's) data, results, external data and the cache."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import DataError

_PACKAGE = Path(__file__).resolve().parent

#: True when only smoke-size work is wanted (``X3MAT_SMOKE=1``).
SMOKE: bool = os.environ.get("X3MAT_SMOKE") == "1"


def root() -> Path | None:
    """The repository's root, or None for an installed package without a repository around it."""
    return _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else None


def data() -> Path:
    """Folder of the shipped data: ``data/`` of the repository, else ``x3mat/data`` of the wheel.

    Raises a DataError if neither folder exists."""
    for folder in (_PACKAGE.parent / "data", _PACKAGE / "data"):
        if folder.is_dir() and (folder.parent == _PACKAGE or (_PACKAGE.parent / "x3mat").is_dir()):
            return folder
    raise DataError("x3mat", "its data folder is missing", "Reinstall the package.")


def results(name: str | Path = "") -> Path:
    """Path below ``data/results``, for example ``results("mof-n2/labels.json")``."""
    return data() / "results" / name


def external() -> Path:
    """Folder of external data that is not shipped, named by the variable ``X3MAT_DATA``.

    Raises a DataError if the variable is unset or does not name a folder."""
    value = os.environ.get("X3MAT_DATA", "")
    if not value:
        raise DataError("X3MAT_DATA", "the variable is not set",
                        "Point it at the folder of external data.")
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise DataError("X3MAT_DATA", f"{value!r} is not a folder", "Point it at an existing one.")
    return folder


def cache() -> Path:
    """User cache folder, created at first use; ``X3MAT_CACHE`` overrides the default place."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("X3MAT_CACHE") or Path(base) / "x3mat").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
