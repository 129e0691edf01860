"""Predicted partial charges, and what is said of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from x3mat import databases, paths, results
from x3mat.applications import application
from x3mat.crystal import crystal_from_arrays
from x3mat.errors import CrystalError, DataError

pytest.importorskip("numba", reason="the command line needs numba")
from x3mat_gcmc import charges, command
from x3mat_gcmc.charges import predicted_charges

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import charges as tool

CRYSTAL = databases.iza("CAN")


def test_charges_are_neutral_and_those_of_equal_atoms_equal():
    found = predicted_charges(CRYSTAL)
    assert found.shape == (CRYSTAL.n_atoms,)
    assert abs(found.sum()) < 1e-9
    moved = np.einsum("gij,nj->gni", CRYSTAL.rotations, CRYSTAL.frac_coords)
    moved += CRYSTAL.translations[:, None]
    for images in moved[:: max(1, len(moved) // 6)]:
        apart = images[:, None] - CRYSTAL.frac_coords
        place = np.linalg.norm((apart - np.rint(apart)) @ CRYSTAL.lattice, axis=2).argmin(1)
        np.testing.assert_allclose(found[place], found, atol=2e-5)


def test_charges_do_not_depend_on_how_a_crystal_is_described():
    found, rng = predicted_charges(CRYSTAL), np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    order = rng.permutation(CRYSTAL.n_atoms)
    moved = (CRYSTAL.frac_coords + rng.random(3))[order]
    turned = crystal_from_arrays(CRYSTAL.lattice @ q, CRYSTAL.species[order], moved, symprec=0.0)
    np.testing.assert_allclose(predicted_charges(turned), found[order], atol=1e-4)
    doubled = crystal_from_arrays(
        CRYSTAL.lattice * [[1], [1], [2]], np.tile(CRYSTAL.species, 2),
        np.concatenate([CRYSTAL.frac_coords / [1, 1, 2], CRYSTAL.frac_coords / [1, 1, 2]
                        + [0, 0, 0.5]]), symprec=0.0)  # fmt: skip
    np.testing.assert_allclose(predicted_charges(doubled), np.tile(found, 2), atol=1e-4)


def test_an_element_that_was_never_learned_is_refused():
    argon = crystal_from_arrays(5 * np.eye(3), np.array([18]), np.zeros((1, 3)), name="argon")
    with pytest.raises(CrystalError, match="Ar were never learned"):
        predicted_charges(argon)


@pytest.mark.parametrize(("stated", "gases", "kind"), [
    (True, ("N2",), "cif"), (False, ("N2",), "model"), (False, ("Ar", "CO2"), "model"),
    (False, ("Ar", "CH4"), "none"),
])  # fmt: skip
def test_which_charges_the_command_takes(tmp_path, stated, gases, kind):
    file = tmp_path / "crystal.cif"
    rows = [f"{s} {s}{i} {x[0]:.8f} {x[1]:.8f} {x[2]:.8f}" + " 0.0" * stated for i, (s, x) in
            enumerate(zip(np.where(CRYSTAL.species == 14, "Si", "O"), CRYSTAL.frac_coords,
                          strict=True))]  # fmt: skip
    a, c = np.linalg.norm(CRYSTAL.lattice, axis=1)[[0, 2]]
    tags = ["type_symbol", "label", "fract_x", "fract_y", "fract_z", *["charge"] * stated]
    file.write_text(
        f"data_x\n_cell_length_a {a}\n_cell_length_b {a}\n_cell_length_c {c}\n_cell_angle_alpha 90"
        "\n_cell_angle_beta 90\n_cell_angle_gamma 120\nloop_\n"
        + "".join(f"_atom_site_{tag}\n" for tag in tags) + "\n".join(rows) + "\n")  # fmt: skip
    framework, found = command.framework_of(str(file), None, gases)
    assert found == kind
    if kind == "model":
        np.testing.assert_allclose(framework.charges, predicted_charges(CRYSTAL), atol=1e-3)
    else:
        assert (framework.charges is None) is not stated
    assert command.framework_of("iza:CAN", None, gases)[1] == "none"
    assert command.framework_of("iza:CAN", "model", gases)[0].charges.std() > 0.1


def test_charges_in_a_simulation(capsys):
    short = ["--cycles", "20", "--equilibration", "10", "--replicas", "1", "--json"]
    assert command.main(["iza:SOD", "--gas", "CO2", "--charges", "model", *short]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["charges"] == "model"


def test_what_is_shipped_is_what_was_checked():
    about = results.read("mof-charge/train.json")
    check = results.read("mof-charge/check.json")
    model, known = charges._model()
    assert vars(model.config) == about["config"] == vars(tool.CONFIG)
    assert known == set(about["species"])
    assert paths.data() / "forcefields" / "ddec6-charges.pt" == tool.FILE
    test = check["qmof_test"]
    assert test["mae_e"] < 0.025
    assert test["mae_e"] < 0.4 * test["mae_of_the_mean_of_each_element_e"]
    assert len(test["with_unknown_elements"]) + test["crystals"] == len(
        application("qmof-gap").folds()[0].halves[1])
    other = check["pacmof2"]
    assert len(other["crystals"]) + len(other["with_unknown_elements"]) == 20
    assert check["pacmof2"]["median_mae_e"] < 0.09  # the least that an EQeq charge differed


def test_what_the_chapter_says_of_uptakes():
    uptake = results.read("gcmc/co2-n2-predicted.json")["summary"]
    theirs = results.read("gcmc/co2-n2-all.json")["summary"]
    assert 0.01 < results.read("mof-charge/check.json")["pacmof2"]["median_mae_e"] < 0.05
    assert uptake["CO2"]["all"]["n"] == 18
    for gas in ("CO2", "N2"):
        deviation = [found[gas]["all"]["median_abs_deviation"] for found in (uptake, theirs)]
        assert deviation[0] > 1.5 * deviation[1]  # due to the charges, not to the program


def test_training_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    try:
        databases.qmof("qmof-a2d95c3", symprec=0.0)
    except DataError as error:
        pytest.skip(f"crystals of others are not shipped: {error}")
    monkeypatch.setattr(paths, "results", lambda name="": tmp_path / name)
    monkeypatch.setattr(tool, "CONFIG", replace(tool.CONFIG, channels=4, feed_forward=4))

    def trained(name: str) -> dict:
        monkeypatch.setattr(tool, "FILE", tmp_path / f"{name}.pt")
        tool.main(["train", "--epochs", "2", "--runs", str(tmp_path / name), "--limit", "12",
                   "--most-atoms", "60"])  # fmt: skip
        return json.loads((tmp_path / "mof-charge" / "train.json").read_text())

    def killed(self):
        if self.current_epoch == 1:
            raise RuntimeError("killed")

    once = trained("once")
    with monkeypatch.context() as patch:
        patch.setattr(tool.Learner, "on_train_epoch_start", killed, raising=False)
        with pytest.raises(RuntimeError, match="killed"):
            trained("cut")
    assert trained("cut")["mae_e"] == once["mae_e"]
    assert len(once["mae_e"]) == 2
