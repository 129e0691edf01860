"""The tool that makes labels of MOFs: it resumes, and its table and record fit together."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed: pip install x3mat[labels]")

import gcmc_checks
import mof_labels

from x3mat import paths
from x3mat.errors import DataError
from x3mat_gcmc import GCMCSettings, kernel, shards
from x3mat_gcmc import system as parts
from x3mat_gcmc.forcefield import guest, load_force_fields

SHORT = GCMCSettings(
    temperature=77.0, cutoff=6.0, spacing=0.4, equilibration=30, cycles=20, replicas=2, trials=8,
    moves=(0.25, 0.2, 0.02, 0.53, 0.0), start="both",
)  # fmt: skip
MIXED = replace(SHORT, gases=("CO2", "N2"), fractions=(0.15, 0.85), temperature=298.0,
                charges="cif", replicas=4, moves=(0.2, 0.15, 0.1, 0.45, 0.1))  # fmt: skip
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
    plans = {name: replace(mof_labels.PLANS[name], passes=(short, replace(short, cycles=40)))
             for name, short in (("mof-n2", SHORT), ("mof-co2n2", MIXED))}  # fmt: skip
    monkeypatch.setattr(mof_labels, "PLANS", plans)
    monkeypatch.setattr(
        gcmc_checks, "mof_candidates", lambda: ([*NAMES, "later"], {"DISORDER": 2}))
    load_force_fields()  # from the real folder of data, before
    monkeypatch.setattr(paths, "data", lambda: tmp_path / "data")
    monkeypatch.setattr(mof_labels, "TARGET", 1e-4)  # nothing is settled by the first pass
    return tmp_path


def simulate(folder, *options, name="mof-n2"):
    packed = ["--packed", str(folder / "pack.npz"), "--batch", "3", "--workers", "2"]
    assert mof_labels.main(["run", name, "--runs", str(folder), *packed, *options]) == 0
    return shards.read_rows(folder)


def check(path, record):
    """A table of labels and its record fit together, and to the rule."""
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names, gases = [row["name"] for row in rows], record["gases"]
    assert list(rows[0]) == mof_labels.columns(gases)
    assert names == sorted(set(names))
    assert len(rows) == record["n_labels"]
    for gas in gases:
        front = f"{gas.lower()}_" if len(gases) > 1 else ""
        mass = guest(gas)["molar_mass"]
        for row in rows:
            value = {unit: float(row[front + unit]) for unit in mof_labels.UNITS}
            assert 0 <= value["mol_per_kg"] < 200
            assert 0 <= value["g_per_L"] < 900
            assert value["molecules_per_cell"] >= 0
            assert np.isfinite(value["error_mol_per_kg"])
            assert abs(value["gap"]) <= 4
            assert value["mg_per_g"] == pytest.approx(mass * value["mol_per_kg"], rel=1e-3)
    for row in rows:
        assert row["equilibrated"] in "01"
        assert int(row["pass"]) < len(record["passes"])
    plan = mof_labels.PLANS[record["data_set"]]
    for settings, part in zip(plan.passes, record["passes"], strict=True):
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
    again = shards.read_rows(file)
    assert [r["name"] for r in again] == NAMES[:2]
    mof_labels.main(["run", "mof-n2", "--runs", str(made), "--packed", str(made / "pack.npz"),
                     "--workers", "1"])  # fmt: skip
    redone = [r for r in shards.read_rows(file) if "name" in r]
    assert [r["name"] for r in redone] == ["two", "one", "odd", "void"]  # those refused first
    kept = {r["name"]: r for r in rows if "name" in r}
    assert all(kept[r["name"]] == r for r in redone)


def test_two_shards_give_the_rows_of_one_process(made, monkeypatch):
    expected = {r["name"]: r for r in simulate(made) if "name" in r}
    (made / "rows.jsonl").unlink()
    rows = simulate(made, "--shard", "1/2")
    assert {r["name"] for r in rows if "name" in r} == set(NAMES[1::2])
    file = made / "rows-1-of-2.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:1]) + lines[1][:40])  # a kill while writing
    for rank in "012":  # three processes go on, as torchrun starts them
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        rows = simulate(made)
    assert sorted(r["name"] for r in rows if "name" in r) == sorted(NAMES)  # none twice
    assert {r["name"]: r for r in rows if "name" in r} == expected
    assert [r["batch"]["shard"] for r in rows if "batch" in r] == ["0/3", "1/3", "2/3"]
    sizes = {p.name: p.stat().st_size for p in made.glob("rows*")}
    assert len(sizes) == 4
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert simulate(made) == rows
    assert {p.name: p.stat().st_size for p in made.glob("rows*")} == sizes
    assert mof_labels.main(["table", "mof-n2", "--runs", str(made)]) == 0
    record = json.loads((made / "data" / "results" / "mof-n2" / "labels.json").read_text())
    assert record["n_labels"] == 3
    assert record["passes"][0]["n"] == 3
    assert mof_labels.main(["rate", "mof-n2", "--runs", str(made)]) == 0
    rate = json.loads((made / "data" / "results" / "gcmc" / "rate-mof-n2.json").read_text())
    assert rate["n"] == 3
    assert rate["passes"] == [p for p in record["passes"] if p["n"]]
    took = [r["batch"]["provenance"]["wall_s"] + r["batch"]["compiled_s"]
            for r in rows if "batch" in r]  # fmt: skip
    assert rate["crystals_per_hour"] == pytest.approx(3600 * 3 / sum(took))
    assert rate["n_precise"] == rate["all"]["n_error_within_2_percent"]
    assert mof_labels.main(["rate", "mof-n2", "--runs", str(made / "nothing")]) == 1


def test_the_last_pass_counts_in_whatever_file(made, monkeypatch):
    plan = mof_labels.PLANS["mof-n2"]
    first = mof_labels.settings_hash(plan.passes[0])
    monkeypatch.setitem(mof_labels.PLANS, "mof-n2", replace(
        plan, passes=(*plan.passes, replace(SHORT, cycles=60))))  # fmt: skip
    monkeypatch.setattr(mof_labels, "is_reached", lambda row, gap: row["settings"] != first)
    rows = [*simulate(made), *simulate(made, "--pass", "1")]
    (made / "rows.jsonl").rename(made / "rows-0-of-2.jsonl")
    shards.append(made / "rows.jsonl", [r for r in rows if r.get("settings") == first])  # read last
    before = shards.read_rows(made)
    assert simulate(made, "--pass", "2") == before
    passes = mof_labels.PLANS["mof-n2"].passes[:2]
    found = mof_labels.by_pass(before, passes)
    both = [mof_labels.settings_hash(p) for p in passes]
    assert [row["name"] for row in found.pop("odd").values()] == ["odd"]  # it failed
    assert len(found) == 3
    for of in found.values():
        assert [of[number]["settings"] for number in (0, 1)] == both


@pytest.mark.parametrize(("shard", "cause"), [("2/2", "no such shard"), ("two", "no shard")])
def test_a_bad_shard_is_refused(made, capsys, shard, cause):
    packed = ["--packed", str(made / "pack.npz"), "--shard", shard]
    assert mof_labels.main(["run", "mof-n2", "--runs", str(made), *packed]) == 1
    assert cause in capsys.readouterr().err


def test_a_process_takes_the_gpu_and_the_cores_that_torchrun_leaves_it(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shards.take_device("cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # not started by torchrun
    monkeypatch.setenv("LOCAL_RANK", "1")
    for shown, taken in (("", "1"), ("4,5", "5")):
        monkeypatch.setattr(shards, "SHOWN", shown)
        for _ in range(2):
            shards.take_device("cuda")
            assert os.environ["CUDA_VISIBLE_DEVICES"] == taken
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DataError, match="names 2 GPUs"):
        shards.take_device("cuda")
    monkeypatch.setattr(shards.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(kernel.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    shards.take_device("cpu")
    assert (shards.cores(), kernel.config.NUMBA_NUM_THREADS) == (2, 2)


def test_table_and_record(made):
    simulate(made)
    rows = simulate(made, "--pass", "1")
    second = {r["name"] for r in rows if r["settings"] == mof_labels.settings_hash(
        mof_labels.PLANS["mof-n2"].passes[1]) and "name" in r}  # fmt: skip
    assert "odd" not in second
    assert second
    assert mof_labels.main(["table", "mof-n2", "--runs", str(made)]) == 0
    record = json.loads((made / "data" / "results" / "mof-n2" / "labels.json").read_text())
    labels = check(made / "data" / "mof-n2" / "labels.csv", record)
    assert [row["name"] for row in labels] == sorted(NAMES[:3])
    assert {row["name"] for row in labels if row["pass"] == "1"} == second
    assert list(record["failed"]) == ["odd"]
    assert record["n_not_simulated"] == 1
    assert record["rule"]["left_out"] == {"DISORDER": 2}
    shipped = json.loads((paths.root() / "data/results/mof-n2/labels.json").read_text())
    for part in (*record["passes"], record["all"]):  # the chapter reads the shipped one
        assert set(shipped["all"]) <= set(part)
    row = next(r for r in rows if r.get("name") == "two")
    label = mof_labels.label_of(row, 0)
    cell = 9.0**3 * 1e-27 * 6.02214076e23  # litres per mole of cells
    expected = row["loadings"]["N2"]["molecules_per_cell"] * guest("N2")["molar_mass"] / cell
    assert float(label["g_per_L"]) == pytest.approx(expected, rel=1e-3)


def test_time_is_kept(made):
    assert simulate(made, "--seconds", "0") == []


def test_a_mixture_has_columns_of_each_gas_and_predicted_charges(made, monkeypatch):
    from x3mat_gcmc import charges

    monkeypatch.setattr(charges, "with_predicted_charges", lambda framework: replace(
        framework, charges=0.1 * (-1.0) ** np.arange(len(framework.species))))  # fmt: skip
    rows = simulate(made, name="mof-co2n2")
    assert {name for name, row in ((r.get("name"), r) for r in rows) if name} == set(NAMES)
    assert mof_labels.main(["table", "mof-co2n2", "--runs", str(made)]) == 0
    record = json.loads((made / "data" / "results" / "mof-co2n2" / "labels.json").read_text())
    labels = check(made / "data" / "mof-co2n2" / "labels.csv", record)
    row = next(r for r in rows if r.get("name") == "void")
    for gas in ("CO2", "N2"):
        litre = 13.0**3 * 1e-27 * 6.02214076e23
        n = row["loadings"][gas]["molecules_per_cell"]
        [label] = [x for x in labels if x["name"] == "void"]
        assert float(label[f"{gas.lower()}_g_per_L"]) == pytest.approx(
            n * guest(gas)["molar_mass"] / litre, rel=1e-3)  # fmt: skip
        assert f"{gas.lower()}_n_without_uptake" in record["all"]


def test_a_pass_that_does_not_exist_is_refused(made, capsys):
    assert mof_labels.main(["run", "mof-co2n2", "--runs", str(made), "--pass", "2"]) == 1
    assert "there is no such pass" in capsys.readouterr().err


def test_a_batch_is_as_large_as_time_allows():
    assert mof_labels.in_time([], 100) == math.inf
    assert mof_labels.in_time([(10, 5.0)], math.inf) == math.inf
    assert mof_labels.in_time([(10, 5.0)], 0) == 0
    assert mof_labels.in_time([(10, 5.0)], 100) == 180
    took = [(100, 60 + 100 * 0.05), (1000, 60 + 1000 * 0.05)]  # s, of its own and for each
    assert mof_labels.in_time(took, 200) == pytest.approx((180 - 60) / 0.05, rel=0.01)
    assert mof_labels.in_time(took, 60) == 0
    took = [(500, 163.0), (982, 145.0)]  # the larger one was the faster
    assert mof_labels.in_time(took, 200) == pytest.approx((180 - 116) / (29 / 982), rel=0.01)
    assert mof_labels.in_time(took, 120) == 0


def test_target_is_of_error_and_of_gap():
    def reached(gap, **gases):
        return mof_labels.is_reached({"loadings": gases}, gap)

    x = {"molecules_per_cell": 10.0, "error": 0.1, "gap": 0.01}
    assert reached(0.02, N2=x)
    assert not reached(0.02, N2={**x, "gap": -0.03})
    assert reached(0.1, N2={**x, "gap": -0.03})
    assert not reached(0.02, N2={**x, "error": 0.3})
    assert not reached(0.02, N2=x, CO2={**x, "error": 0.3})
    none = {"molecules_per_cell": 0.0, "error": 0.001, "gap": 0.0}
    assert reached(0.02, N2=none, CO2=x)
    assert not reached(0.02, N2={**none, "error": 0.02})


def test_settings_hash_follows_settings_and_parameters(monkeypatch):
    before = mof_labels.settings_hash(SHORT)
    assert mof_labels.settings_hash(replace(SHORT, seed=2)) != before
    monkeypatch.setattr(parts, "guest", lambda name: {**guest(name), "molar_mass": 1.0})
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
