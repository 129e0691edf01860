"""Public files are downloaded once, their hash is checked, and they stay in the cache folder."""

from __future__ import annotations

from pathlib import Path

from x3mat import paths
from x3mat.errors import DataError


def fetch(url: str, name: str, sha256: str | None = None) -> Path:
    """The file behind ``url`` in the cache folder, under this name, fetched if it is not there.

    Raises a DataError if pooch is missing, the network is, or the file is not the expected one.
    """
    try:
        import pooch

        return Path(pooch.retrieve(url, sha256 and f"sha256:{sha256}", fname=name,
                                   path=paths.cache(), progressbar=True))  # fmt: skip
    except ImportError:
        cause, remedy = "pooch is not installed", "Type: pip install pooch"
    except (OSError, ValueError) as error:  # no network; another file than expected
        cause, remedy = str(error), "Try again, or download it by hand and name the file."
    raise DataError(url, f"it cannot be downloaded ({cause})", remedy)
