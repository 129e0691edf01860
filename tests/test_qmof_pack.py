"""The archive of QMOF becomes the file that x3mat reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from x3mat import databases
from x3mat.applications import application
from x3mat.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import qmof_pack


@pytest.fixture
def archive(tmp_path):
    (tmp_path / "cif").mkdir()
    for name, a in (("qmof-0001b0d", 5.0), ("qmof-00052d0", 6.0), ("qmof-nosuch", 7.0)):
        Structure(Lattice.orthorhombic(a, 5, 4), ["Zn", "O"], [[0, 0, 0], [0.5, 0.5, 0.4]]).to(
            str(tmp_path / "cif" / f"{name}.cif"))  # fmt: skip
    (tmp_path / "qmof.csv").write_text(
        "qmof_id,name,outputs.pbe.bandgap\nqmof-0001b0d,a,1.5\nqmof-00052d0,b,\nqmof-nosuch,c,2\n")
    return tmp_path


def test_packed_crystals_are_read_again(archive, monkeypatch, capsys):
    assert qmof_pack.main([str(archive / "cif"), str(archive / "qmof.csv"),
                           "--out", str(archive)]) == 0  # fmt: skip
    assert "1 of 18872 crystals" in capsys.readouterr().out  # one has no label, one no place
    monkeypatch.setenv("X3MAT_DATA", str(archive))
    databases._qmof_arrays.cache_clear()
    try:
        assert application("qmof-gap").labels().bandgap_pbe_eV.to_dict() == {"qmof-0001b0d": 1.5}
        crystal = databases.qmof("qmof-0001b0d")
        np.testing.assert_allclose(np.linalg.norm(crystal.lattice, axis=1), [5, 5, 4])
        assert sorted(crystal.species.tolist()) == [8, 30]
        with pytest.raises(DataError, match="no QMOF name"):
            databases.qmof("qmof-00052d0")
    finally:
        databases._qmof_arrays.cache_clear()


def test_wrong_folder_is_refused(archive, capsys):
    assert qmof_pack.main([str(archive), str(archive / "qmof.csv")]) == 1
    assert "has no file such as" in capsys.readouterr().err
    assert qmof_pack.main([str(archive / "none"), str(archive / "qmof.csv")]) == 1
