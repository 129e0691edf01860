"""GCMC by one and by two processes: both give the same rows, and differences would be seen."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed: pip install x3mat[labels]")

import bench_gcmc_gpus as bench


def test_two_processes_give_the_rows_of_one(tmp_path):
    atoms = np.random.default_rng(0).random((3, 3))
    np.savez(
        tmp_path / "mofs.npz", name=np.array(["a", "b", "c", "odd", "e"]),
        ptr=np.array([0, 3, 6, 9, 10, 13]),
        lattice=np.array([9.0, 9.5, 10.0, 9.0, 10.5])[:, None, None] * np.eye(3),
        species=np.array([6, 6, 8] * 3 + [0] + [6, 6, 8]),
        frac=np.concatenate([atoms] * 3 + [atoms[:1]] + [atoms]), charges=np.full(13, np.nan),
    )  # fmt: skip
    out = tmp_path / "gpus.json"
    options = ["--limit", "5", "--device", "cpu", "--equilibration", "4", "--cycles", "10"]
    assert bench.main(["--packed", str(tmp_path / "mofs.npz"), *options, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["crystals"], found["failed"], found["chains"], found["batch"]) == (5, 1, 8, 2)
    same = found["comparison"]
    assert (same["rows"], same["identical"], same["largest_relative_difference"]) == (5, 5, 0)
    assert same["only_in_one"] == []
    assert [of["batches"] for of in found["one"]["each"]] == [3]
    assert [of["batches"] for of in found["several"]["each"]] == [2, 1]
    assert [of["shard"] for of in found["several"]["each"]] == ["0/2", "1/2"]
    for run in (found["one"], found["several"]):
        assert sum(of["moves"] for of in run["each"]) == found["moves"] > 0
        assert sum(of["crystals"] for of in run["each"]) == 5
        assert all(0 < of["chains_s"] < run["wall_s"] for of in run["each"])
        assert all(of["after_start_s"] + of["start_s"] < run["wall_s"] for of in run["each"])
    assert found["speed_up"] == found["one"]["wall_s"] / found["several"]["wall_s"]
    assert found["efficiency"] == found["speed_up"] / 2
    assert "bench_gcmc_gpus.py" in found["provenance"]["command"]


def test_differences_are_seen():
    row = {"name": "a", "loadings": {"N2": {"error": 2.0}}, "quarters": [[1.0, 0.0]]}
    other = {"name": "a", "loadings": {"N2": {"error": 2.0}}, "quarters": [[1.0 - 1e-6, 0.0]]}
    assert bench.difference(row, row) == 0
    assert bench.difference(row, other) == pytest.approx(1e-6)
    assert bench.difference(row, {**row, "quarters": []}) == math.inf
    assert bench.difference(row, {**row, "name": "b"}) == math.inf
    found = bench.compare({"a": row, "b": row}, {"a": other, "b": row, "c": row})
    assert (found["identical"], found["worst"], found["only_in_one"]) == (1, "a", ["c"])
    assert not found["same"]
    assert bench.compare({"a": row}, {"a": row})["same"]


def test_the_slowest_process_counts():
    def batch(shard, chains):
        return {"batch": {
            "shard": shard, "device": "gpu", "crystals": 3, "moves": 10, "compiled_s": 1.0,
            "waited_for_grids_s": 0.5, "chains_s": chains,
        }}  # fmt: skip

    one = bench.times(1, 20.0, [batch("0/1", 6.0), {"name": "a"}, batch("0/1", 5.0)])
    two = bench.times(2, 12.0, [batch("1/2", 5.0), batch("0/2", 5.5)])
    assert [of["shard"] for of in two["each"]] == ["0/2", "1/2"]
    assert (two["chains_s"], two["after_start_s"]) == (5.5, 6.0)
    found = bench.speed(one, two)
    assert found == pytest.approx({
        "speed_up": 20 / 12, "efficiency": 10 / 12, "speed_up_after_start": 2.0,
        "efficiency_after_start": 1.0, "speed_up_of_chains": 2.0, "efficiency_of_chains": 1.0,
    })  # fmt: skip
