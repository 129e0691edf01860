"""Densities of N2 in zeolites: what the files hold, and that a run goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed: pip install x3mat[labels]")

import density_maps
import zeolite_maps
from small_models import write

from x3mat import databases, paths, results
from x3mat.applications import application
from x3mat.predict import load_model
from x3mat_book import densities
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


# ------------------------------------------------------------------- site maps beside densities


def test_maps_of_networks_that_never_saw_the_zeolite(made, tmp_path, monkeypatch):
    """Of three networks two never saw ABW; SOD, which all but one saw, is empty."""
    for seed, train in enumerate((["CHA"], ["ABW"], ["CHA"])):
        write(tmp_path / "three" / f"{seed}.pt", seed, train=train)
    monkeypatch.setattr(paths, "results", lambda name="": tmp_path / name)
    folder = tmp_path / "densities"
    folder.mkdir()
    (folder / "ABW.npz").write_bytes((made / "ABW.npz").read_bytes())
    np.savez(folder / "SOD.npz", density=np.zeros((4, 4, 4), np.float16))
    command = ["--model", str(tmp_path / "three"), "--densities", str(folder), "--seeds", "1",
               "--unseen", "--step", "3", "--output", "found"]  # fmt: skip
    zeolite_maps.main(command)
    record = results.read("found.json")
    assert (record["empty"], list(record["zeolites"]), record["step"]) == (["SOD"], ["ABW"], 3.0)
    row = record["zeolites"]["ABW"]
    assert row["n_held_out"] == 2
    assert "all" not in row["r2"]
    unseen = load_model(tmp_path / "three").without("ABW")
    windows = unseen.windows(databases.iza("ABW"), 3.0)
    reference = zeolite_maps.ball_average(
        windows, databases.iza("ABW"), zeolite_maps.load_density("ABW", folder), 2.0, 0.5)
    expected = densities.correlations(windows, unseen.contributions(windows).mean(0), reference)
    assert row["r2"]["held_out"] == pytest.approx(expected)
    assert record["median"]["r2"]["held_out"]["median"] == pytest.approx(expected["spearman"])
    assert record["provenance"]["command"].endswith("--step 3 --output found")


def test_differences_are_taken_zeolite_by_zeolite():
    def row(own, untrained, atoms, distance):
        one = {"held_out": {"spearman": own}, "untrained": {"spearman_abs": untrained},
               "atom_count": {"spearman": atoms}, "nearest_atom": {"spearman": distance}}
        return dict.fromkeys((f"r{r:g}" for r in zeolite_maps.RADII), one)

    found = zeolite_maps.paired({"A": row(0.5, 0.1, -0.2, 0.6), "B": row(0.7, 0.3, 0.2, 0.3),
                                 "C": row(0.1, 0.2, 0.1, -0.4)})["r4"]  # fmt: skip
    assert found["untrained"]["median"] == pytest.approx(0.4)  # 0.4, 0.4, -0.1
    assert found["atom_count"]["median"] == pytest.approx(0.3)  # 0.3, 0.9, 0.2
    assert found["nearest_atom"]["median"] == pytest.approx(0.4)  # -0.1, 0.4, 0.5
    assert [found[name]["n_better"] for name, *_ in zeolite_maps.CONTROLS] == [2, 3, 2]
    assert found["untrained"]["interval"] == pytest.approx([-0.1, 0.4])
