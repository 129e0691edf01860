"""Every notebook runs under papermill with injected parameters, at its smallest size.

The front matter of a chapter may name the smallest parameters that still run every cell:
``x3mat: {smallest: {EPOCHS: 1}}``.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_with_parameters(path, tmp_path, monkeypatch):
    papermill = pytest.importorskip("papermill", reason="papermill is not installed")
    monkeypatch.setenv("X3MAT_SMOKE", "0")  # the size comes from the parameters
    smallest = nbformat.read(path, 4).metadata.get("x3mat", {}).get("smallest", {})
    done = papermill.execute_notebook(
        str(path), str(tmp_path / path.name), parameters={"SMOKE": True, **smallest},
        cwd=str(path.parent), kernel_name="python3", progress_bar=False, log_output=False,
    )  # fmt: skip
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    injected = [i for i, c in enumerate(cells) if "injected-parameters" in c.metadata.tags]
    assert len(injected) == 1
    assert "parameters" in cells[injected[0] - 1].metadata.tags
    assert all(cell.execution_count for cell in cells)
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
