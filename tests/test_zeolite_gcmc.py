"""Labels of zeolites by x3mat_gcmc: strained copies, tables, record, and one live simulation."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed: pip install x3mat[labels]")

import zeolite_gcmc as tool

from x3mat import databases, paths, results
from x3mat_gcmc import gcmc, shards
from x3mat_gcmc.forcefield import SYMBOLS, bond_charges
from x3mat_gcmc.system import settings_hash

pytestmark = pytest.mark.skipif(  # not importorskip: its import by itself raises an error
    find_spec("zse") is None, reason="zeose is not installed: pip install x3mat[zeolites]"
)
FOLDER = paths.data() / "zeolite-n2"


@pytest.fixture(scope="module")
def labels():
    return tool.read_table(FOLDER / "labels.csv")


@pytest.fixture(scope="module")
def copies():
    return tool.read_table(FOLDER / "strained.csv")


@pytest.fixture(scope="module")
def record():
    return results.read("zeolite-n2/gcmc.json")


@pytest.mark.parametrize("code", ["SOD", "CLO", "RON"])  # the last two are interrupted
def test_strain_keeps_the_bonds(code):
    crystal = databases.iza(code)
    symbols = [SYMBOLS[z - 1] for z in crystal.species]
    charges = bond_charges(crystal.lattice, crystal.frac_coords, symbols, tool.SHORT.force_field)
    for name in tool.copies([code]):
        copy = databases.iza(name)
        found = bond_charges(copy.lattice, copy.frac_coords, symbols, tool.SHORT.force_field)
        np.testing.assert_array_equal(found, charges)


def test_tables_are_complete(labels, copies):
    codes = list(databases.iza_codes())
    assert [row["code"] for row in labels] == codes
    assert len(codes) == 253
    assert sorted(row["name"] for row in copies) == sorted(tool.copies(codes))
    assert len(copies) == 1518
    assert {row["settings"] for row in labels} == {settings_hash(tool.LABEL)}
    for rows in labels, copies:
        value, error = tool.columns_of(rows, "n2_g_L", "error_g_L")
        assert (value >= 0).all()
        assert (error > 0).all()
    value, kilogram, number = tool.columns_of(labels, "n2_g_L", "mol_per_kg", "molecules_per_cell")
    for i in range(0, 253, 25):
        crystal = databases.iza(codes[i])
        assert value[i] == pytest.approx(kilogram[i] * crystal.density * 28.0134, rel=2e-4)
        assert value[i] == pytest.approx(
            number[i] * 28.0134 / 0.602214076 / crystal.volume * 1000, rel=2e-4)  # fmt: skip


def test_record_is_of_the_tables(labels, copies, record):
    for key, rows in (("labels", labels), ("strained", copies)):
        found = results.plain(tool.summary(*tool.columns_of(rows, "n2_g_L", "error_g_L")))
        for name, value in found.items():
            assert record[key][name] == pytest.approx(value), name
    assert record["strained"]["strain"] == tool.STRAIN == databases.strained.__defaults__[0]
    for code, found in record["labels"]["named"].items():
        [row] = [row for row in labels if row["code"] == code]
        assert found == pytest.approx([row["n2_g_L"], row["error_g_L"]])
    other = {row["code"]: row for row in tool.read_table(FOLDER / "raspa3.csv")}
    pairs = [(float(row["n2_g_L"]), float(other[row["code"]]["n2_g_L"])) for row in labels]
    mine, raspa = np.array(pairs).T
    part = raspa >= tool.FEW
    agreement = record["agreement_with_raspa3"]
    deviation = mine[part] / raspa[part] - 1
    assert agreement["mean_relative_deviation"] == pytest.approx(deviation.mean())
    assert agreement["n"] == 253
    assert agreement["rms_z"] < 1.3
    assert abs(agreement["median_relative_deviation"]) < 0.005
    for worst in agreement["worst"]:  # the guess why
        value, error = worst["n2_g_L"]
        other, other_error = worst["earlier_g_L"]
        assert abs(value - other) < 3 * np.hypot(error, other_error)
        if worst["other_counting_alone"]:
            ends = sorted(worst[f"other_{way}_g_L"][0] for way in ("counting", "insertion"))
            assert ends[0] < value < ends[1]
    assert record["labels"]["median_relative_error"] < 0.002
    assert record["strained"]["median_relative_error"] < 0.01
    for key, most in (("labels", 0.003), ("strained", 0.01)):  # what grids cost
        found = record[key]["agreement_with_fine_grids"]
        assert abs(found["median_relative_deviation"]) < most


def test_one_framework_again(labels):
    [row] = [row for row in labels if row["code"] == "SOD"]
    settings = replace(tool.LABEL, replicas=4, cycles=1000, seed=99)
    [result] = gcmc([databases.iza("SOD")], settings)
    found = result.loadings["N2"]
    error = np.hypot(found.error_g_per_L, float(row["error_g_L"]))
    assert abs(found.g_per_L - float(row["n2_g_L"])) < 4 * error


def test_resumes(tmp_path, monkeypatch):
    short = replace(tool.SHORT, equilibration=10, cycles=20, spacing=0.6)
    monkeypatch.setattr(tool, "SHORT", short)
    monkeypatch.setitem(tool.CHECKS, "strained", (short, 1))
    monkeypatch.setattr(tool, "COPIES", 2)
    monkeypatch.setattr(databases, "iza_codes", lambda: ("ABW", "ATN"))
    command = ["strained", "--runs", str(tmp_path), "--batch", "3"]
    assert tool.main([*command, "--limit", "1"]) == 0
    file = tmp_path / "strained.jsonl"
    assert [row["name"] for row in shards.read_rows(file)] == ["ABW~1", "ABW~2"]
    before = file.read_text()
    assert tool.main(command) == 0
    assert file.read_text().startswith(before)
    assert [r["name"] for r in shards.read_rows(file)] == ["ABW~1", "ABW~2", "ATN~1", "ATN~2"]
    assert all(row["n2_g_L"] > 0 for row in tool.rows_of(file, short).values())
