"""Maps of CO2 and N2 in MOFs beside simulated densities."""

from __future__ import annotations

from dataclasses import replace

import mof_maps
import numpy as np
import pytest

from x3mat import results
from x3mat.applications import application
from x3mat.predict import load_model


@pytest.fixture(scope="module")
def record():
    return results.read("mof-co2n2/maps.json")


def test_crystals_are_of_the_test_half(record):
    app = application(mof_maps.NAME)
    names = [row["name"] for row in record["rows"]]
    assert names == mof_maps.chosen(record["n"])
    assert set(names) <= set(app.folds()[0].halves[1])
    assert record["n"] == mof_maps.NUMBER == len(names)
    assert app.labels().loc[names, "CO2"].min() >= record["least_g_per_L"]
    assert max(row["n_atoms"] for row in record["rows"]) <= record["most_atoms"]


def test_the_summary_is_of_the_rows(record):
    again = results.plain(mof_maps.summary(record["rows"]))
    assert again == record["summary"]


def test_what_is_said_of_maps(record):
    for gas in mof_maps.GASES:
        found = record["summary"][gas]
        sharp, ball = (found[kind]["pearson"] for kind in ("gaussian", "ball"))
        assert sharp["told"][1] > 0.98 > 0.6 > sharp["atoms"][1]
        assert sharp["halves"][0] > 0.99
        gaps = [each["told"][1] - each["atoms"][1] for each in (sharp, ball)]
        assert gaps[0] > gaps[1] > 0  # "smaller, but it is there"
        # "no better" than the lattice gas
        assert sharp["told"][1] <= sharp["lattice gas"][1]
        assert sharp["told_above_lattice_gas"] < record["n"] / 2
        told, alone = (np.array([row[gas]["gaussian"][how]["pearson"] for row in record["rows"]])
                       for how in ("told", "lattice gas"))  # fmt: skip
        spoiled = int((told < alone - 0.1).sum())
        assert spoiled == 0 if gas == "CO2" else 3 <= spoiled <= 5  # "a few"
        values = [row[gas]["gaussian"][how]["pearson"] for row in record["rows"]
                  for how in mof_maps.MAPS]  # fmt: skip
        assert min(values) > -0.45  # the figure's range


def test_a_map_is_compared_with_what_was_counted(tmp_path):
    """A short simulation; the lattice gas beside itself."""
    settings = replace(mof_maps.SETTINGS, equilibration=20, cycles=40, replicas=1)
    name = "VANXUD_clean"
    density = mof_maps.simulated(name, settings, tmp_path)
    assert density.shape[:2] == (2, 2)
    crystal = application(mof_maps.NAME).crystal(name, symprec=0.0)
    label = application(mof_maps.NAME).labels().loc[name, ["CO2", "N2"]]
    moles = density.mean((0, 2, 3, 4)) * 1e27 / 6.02214076e23 * [44.01, 28.0134]
    assert moles[0] == pytest.approx(label.CO2, rel=0.3)
    assert crystal.n_atoms == 48
    again = mof_maps.simulated(name, settings, tmp_path)  # from its file
    assert (again == density).all()
    models = {how: replace(model := load_model(f"mof-co2n2{end}:CO2"),
                           members=model.members[:1], about=model.about[:1])
              for how, end in (("atoms", ""), ("told", "-told"))}  # fmt: skip
    row = mof_maps.compared(name, density, models)
    for gas in mof_maps.GASES:
        for kind in ("gaussian", "ball"):
            found = row[gas][kind]
            assert set(found) == {"halves", *mof_maps.MAPS}
            assert all(-1 <= x <= 1 for each in found.values() for x in each.values())
    assert row["CO2"]["gaussian"]["lattice gas"]["pearson"] > 0.9
    assert np.isfinite(row["windows"])
