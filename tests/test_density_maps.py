"""Densities of N2 in zeolites: what the files hold, and that a run goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed: pip install x3mat[labels]")

import density_maps
import zeolite_maps

from x3mat import databases, paths, results
from x3mat.applications import application
from x3mat_gcmc.density import orbit_average

SHORT = ["--codes", "ABW", "--equilibration", "20", "--cycles", "100", "--replicas", "2",
         "--jobs", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    run(folder)
    return folder


def run(folder, *options):
    arguments = [*SHORT, *options, "--folder", str(folder), "--record", str(folder / "x.json")]
    assert density_maps.main(arguments) == 0
    return json.loads((folder / "x.json").read_text())


def test_file_and_record_fit_together(made):
    record, crystal = json.loads((made / "x.json").read_text()), databases.iza("ABW")
    row = record["zeolites"]["ABW"]
    with np.load(made / "ABW.npz") as file:
        density = file["density"].astype(float)
        assert file["density"].dtype == np.float16
        assert (file["cycles"], file["n_centres"]) == (400, row["n_centres"])
        np.testing.assert_allclose(file["lattice"], crystal.lattice)
    assert list(density.shape) == row["grid"]
    assert row["samples"] == 400
    per_cell = row["n_centres"] / row["samples"] / row["n_cells"]
    assert row["n_centres"] > 0
    assert row["molecules_per_cell"] == pytest.approx(per_cell)
    assert density.mean() * crystal.volume == pytest.approx(per_cell, rel=0.01)  # averaged
    averaged = orbit_average(density, crystal.rotations, crystal.translations)
    assert density_maps.density_check.pearson(averaged, density) > 0.8
    assert row["expected"] == pytest.approx(2 * row["halves"] / (1 + row["halves"]))
    assert record["summary"]["bytes"] == (made / "ABW.npz").stat().st_size
    assert record["provenance"]["seed"] == [1, 2]
    read = zeolite_maps.load_density("ABW", made)
    np.testing.assert_allclose(read, density * zeolite_maps.grams_per_litre(zeolite_maps.N2, 1.0))


def test_a_run_goes_on(made, capsys, tmp_path):
    before = (made / "ABW.npz").read_bytes()
    run(made)
    assert "0 zeolites to simulate, 1 are there" in capsys.readouterr().out
    assert (made / "ABW.npz").read_bytes() == before
    run(made, "--cycles", "50")
    assert "1 zeolites to simulate" in capsys.readouterr().out
    pack = density_maps.gcmc_checks.load("zeolite-n2", 0, ["ABW"])
    np.savez(tmp_path / "pack.npz", **pack)
    run(tmp_path, "--packed", str(tmp_path / "pack.npz"))
    with np.load(tmp_path / "ABW.npz") as file, np.load(made / "ABW.npz") as other:
        assert not np.array_equal(file["density"], other["density"])
    run(made)
    with np.load(tmp_path / "ABW.npz") as file, np.load(made / "ABW.npz") as other:
        np.testing.assert_array_equal(file["density"], other["density"])
    arguments = ["--codes", "LTA", "--packed", str(tmp_path / "pack.npz"), "--folder", str(made)]
    assert density_maps.main(arguments) == 1
    assert "it lacks LTA" in capsys.readouterr().err


def test_empty_zeolites_are_named():
    row = {"code": "A", "halves": None, "z": 9.0, "samples": 1, "moves": 1, "bytes": 1,
           "seconds": 1.0}  # fmt: skip
    full = {**row, "code": "B", "halves": 0.9, "expected": 0.94, "n_centres": 5, "symmetry": 0.8,
            "z": -2.0}  # fmt: skip
    found = density_maps.summary([row, full])
    assert (found["empty"], found["below_target"], found["rms_z"]) == (["A"], ["B"], 2.0)
    assert found["halves"]["median"] == 0.9


def test_record_is_of_the_rest_of_the_fold():
    record = results.read("zeolite-n2/densities.json")
    rest = application("zeolite-n2").folds()[0].rest
    assert len(rest) <= 200
    assert sorted(record["zeolites"]) == sorted(rest)
    folder, settings = paths.data() / "zeolite-n2" / "density-fold-0", density_maps.SETTINGS
    rows = {code: density_maps.load(folder, code, settings) for code in rest}
    assert all(rows.values())
    assert record["summary"]["bytes"] == sum(row["bytes"] for row in rows.values()) < 3e6
