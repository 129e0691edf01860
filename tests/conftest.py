"""What several files of tests share."""

from __future__ import annotations

import pytest
from small_models import write


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with two untrained networks."""
    folder = tmp_path_factory.mktemp("models") / "small"
    for seed in range(2):
        write(folder / f"{seed}.pt", seed)
    return folder
