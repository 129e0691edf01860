"""The tool that makes N2 labels of MOFs: it resumes, and its table and record fit together."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed: pip install x3mat[labels]")

import gcmc_checks
import mof_labels

from x3mat import paths
from x3mat_gcmc import GCMCSettings
from x3mat_gcmc.forcefield import guest, load_force_fields

SHORT = GCMCSettings(
    temperature=77.0, cutoff=6.0, spacing=0.4, equilibration=30, cycles=20, replicas=2, trials=8,
    moves=(0.25, 0.2, 0.02, 0.53, 0.0), start="both",
)  # fmt: skip
NAMES = ["two", "one", "void", "odd"]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A file of four small crystals, of which the last has an element without parameters."""
    atoms = np.random.default_rng(0).random((3, 3))
    pack = {
        "name": np.array(NAMES), "ptr": np.array([0, 3, 6, 7, 8]),
        "lattice": np.array([9.0, 9.5, 13.0, 9.0])[:, None, None] * np.eye(3),
        "species": np.array([6, 6, 8, 6, 6, 8, 14, 0]),
        "frac": np.concatenate([atoms, atoms, atoms[:2]]), "charges": np.full(8, np.nan),
    }  # fmt: skip
    np.savez(tmp_path / "pack.npz", **pack)
    monkeypatch.setattr(mof_labels, "PASSES", (SHORT, replace(SHORT, cycles=40)))
    monkeypatch.setattr(
        gcmc_checks, "mof_candidates", lambda: ([*NAMES, "later"], {"DISORDER": 2}))
    load_force_fields()  # from the real folder of data, before
    monkeypatch.setattr(paths, "data", lambda: tmp_path / "data")
    monkeypatch.setattr(mof_labels, "TARGET", 1e-4)  # nothing is settled by the first pass
    return tmp_path


def simulate(folder, *options):
    packed = ["--packed", str(folder / "pack.npz"), "--batch", "3", "--workers", "2"]
    assert mof_labels.main(["--runs", str(folder), "run", *packed, *options]) == 0
    return mof_labels.read_rows(folder / "rows.jsonl")


def check(path, record):
    """A table of labels and its record fit together, and to the rule."""
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [row["name"] for row in rows]
    assert list(rows[0]) == list(mof_labels.COLUMNS)
    assert names == sorted(set(names))
    assert len(rows) == record["n_labels"]
    mass = guest("N2")["molar_mass"]
    for row in rows:
        value = {k: float(row[k]) for k in mof_labels.COLUMNS[1:]}
        assert 0 <= value["mol_per_kg"] < 200
        assert 0 <= value["g_per_L"] < 900
        assert value["molecules_per_cell"] >= 0
        assert np.isfinite(value["error_mol_per_kg"])
        assert -2 <= value["gap"] <= 2
        assert value["mg_per_g"] == pytest.approx(mass * value["mol_per_kg"], rel=1e-3)
        assert row["equilibrated"] in "01"
        assert int(row["pass"]) < len(record["passes"])
    for settings, part in zip(mof_labels.PASSES, record["passes"], strict=True):
        assert part["hash"] == mof_labels.settings_hash(settings)
    return rows


def test_a_run_goes_on_where_it_was_cut_off(made):
    rows = simulate(made)
    assert [r["name"] for r in rows if "name" in r] == [*NAMES[:3], "odd"]
    assert "no parameters" in rows[-2]["failed"]
    file = made / "rows.jsonl"
    assert simulate(made) == rows  # nothing is left to do
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])  # a kill while writing
    again = mof_labels.read_rows(file)
    assert [r["name"] for r in again] == NAMES[:2]
    mof_labels.main(["--runs", str(made), "run", "--packed", str(made / "pack.npz"),
                     "--workers", "1"])  # fmt: skip
    redone = [r for r in mof_labels.read_rows(file) if "name" in r]
    assert [r["name"] for r in redone] == ["two", "one", "odd", "void"]  # those refused first
    kept = {r["name"]: r for r in rows if "name" in r}
    assert all(kept[r["name"]] == r for r in redone)


def test_table_and_record(made):
    simulate(made)
    rows = simulate(made, "--pass", "1")
    second = {r["name"] for r in rows if r["settings"] == mof_labels.settings_hash(
        mof_labels.PASSES[1]) and "name" in r}  # fmt: skip
    assert "odd" not in second
    assert second
    assert mof_labels.main(["--runs", str(made), "table"]) == 0
    record = json.loads((made / "data" / "results" / "mof-n2" / "labels.json").read_text())
    labels = check(made / "data" / "mof-n2" / "labels.csv", record)
    assert [row["name"] for row in labels] == sorted(NAMES[:3])
    assert {row["name"] for row in labels if row["pass"] == "1"} == second
    assert list(record["failed"]) == ["odd"]
    assert record["n_not_simulated"] == 1
    assert record["rule"]["left_out"] == {"DISORDER": 2}
    row = next(r for r in rows if r.get("name") == "two")
    label = mof_labels.label_of(row, 0)
    cell = 9.0**3 * 1e-27 * 6.02214076e23  # litres per mole of cells
    expected = row["molecules_per_cell"] * guest("N2")["molar_mass"] / cell
    assert float(label["g_per_L"]) == pytest.approx(expected, rel=1e-3)


def test_time_is_kept(made):
    assert simulate(made, "--seconds", "0") == []


def test_target_is_of_error_and_of_gap():
    row = {"molecules_per_cell": 10.0, "error": 0.1, "gap": 0.01}
    assert mof_labels.is_reached(row)
    assert not mof_labels.is_reached({**row, "gap": -0.03})
    assert not mof_labels.is_reached({**row, "error": 0.3})
    assert mof_labels.is_reached({"molecules_per_cell": 0.0, "error": 0.001, "gap": 0.0})


def test_settings_hash_follows_settings_and_parameters(monkeypatch):
    before = mof_labels.settings_hash(SHORT)
    assert mof_labels.settings_hash(replace(SHORT, seed=2)) != before
    monkeypatch.setattr(mof_labels, "guest", lambda name: {**guest(name), "molar_mass": 1.0})
    assert mof_labels.settings_hash(SHORT) != before


def test_rule_of_the_crystals(monkeypatch):
    from x3mat import databases
    from x3mat.errors import CrystalError

    table = {name: {"DISORDER": "", "LCD": "8"} for name in "abcdef"}
    table["b"]["DISORDER"], table["c"]["LCD"] = "DISORDER", "3.7"

    def crystal(name):
        if name == "e":
            raise CrystalError("e", "atoms overlap", "Restore it.")
        return SimpleNamespace(n_atoms=501 if name == "d" else 500)

    monkeypatch.setattr(databases, "core_mof_table", lambda _: table)
    monkeypatch.setattr(databases, "core_mof", crystal)
    order, left_out = gcmc_checks.mof_candidates()
    assert sorted(order) == ["a", "f"]
    assert left_out == {
        "DISORDER": 1, "cavity too narrow": 1, "refused": 1, "too many atoms": 1}


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as done:
        mof_labels.main(["--help"])
    assert done.value.code == 0
    assert "examples:\n  python tools/mof_labels.py run" in capsys.readouterr().out
