"""Prediction over databases: resuming, shards, bad crystals, the same values as one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_models import CONFIG, write
from typer.testing import CliRunner

import x3mat
from x3mat import databases, screening
from x3mat.cli import app
from x3mat.crystal import READ
from x3mat.errors import DataError
from x3mat.screening import side_by_side

CODES = ("SOD", "CAN", "ABW", "ATN", "AFI", "LTA", "CHA")


@pytest.fixture(scope="module")
def ensemble(model):
    return x3mat.load_model(model)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for code in CODES[:4]:
        databases.iza(code).structure.to(filename=str(folder / f"{code}.cif"))
    (folder / "half.cif").write_text((folder / "SOD.cif").read_text()[:200])
    (folder / "notes.txt").write_text("no crystal")
    return folder


def sources(codes=CODES):
    return [f"iza:{code}" for code in codes]


def screen(ensemble, out, names=None, **options):
    return screening.screen(names or sources(), ensemble, out, **options)


def test_values_are_those_of_single_predictions(ensemble, tmp_path):
    found = screen(ensemble, tmp_path / "out", max_atoms=3_000)
    assert found.file.tolist() == sources()
    for row in found.itertuples():
        one = x3mat.predict(databases.crystal(row.file), ensemble)
        assert row.value == pytest.approx(one.value, rel=1e-5)
        assert row.std == pytest.approx(one.std, rel=1e-4)
        assert (row.y0 + row.y1) / 2 == pytest.approx(row.value)
        assert (row.name, row.n_windows, row.n_orbits) == (one.name, one.n_windows, one.n_orbits)
        assert row.warnings == "; ".join(one.warnings)
    assert (found.error == "").all()
    table = pd.read_parquet(tmp_path / "out")
    assert sorted(table.file) == sorted(sources())
    assert set(screening.COLUMNS) < set(table.columns)


@pytest.mark.parametrize("max_atoms", [1, 10**9])
def test_any_budget_gives_the_same(ensemble, tmp_path, max_atoms):
    found = screen(ensemble, tmp_path / "a", max_atoms=max_atoms)
    expected = screen(ensemble, tmp_path / "b")
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-6)


def test_members_may_hear_as_far_as_each_was_trained_to(tmp_path):
    """Pairs are found once for all of them, for the longest cutoff."""
    folder = tmp_path / "models"
    for seed, cutoff in enumerate((2.0, 4.0)):
        config = replace(CONFIG, encoding="crystal", layers=2, cutoff=cutoff)
        write(folder / f"{seed}.pt", seed, config)
    both = x3mat.load_model(folder)
    table = screening.screen(sources(CODES[:4]), both, tmp_path / "results")
    for row, code in zip(table.itertuples(), CODES, strict=False):
        expected = both.values(both.windows(databases.iza(code)))
        assert [row.y0, row.y1] == pytest.approx(expected, rel=1e-4)


def test_a_killed_run_goes_on(ensemble, tmp_path, monkeypatch):
    monkeypatch.setattr(screening, "PART", 2)
    read = []

    def killed(source):
        if len(read) == 5:
            raise KeyboardInterrupt
        read.append(source)
        return databases.crystal(source)

    with pytest.raises(KeyboardInterrupt):
        screen(ensemble, tmp_path / "out", read=killed, max_atoms=1)
    done = screening.read_results(tmp_path / "out")
    assert 2 <= len(done) < 5
    (tmp_path / "out" / ".abc.parquet.123").write_bytes(b"half of a fi")  # of a harder kill

    def counted(source):
        assert source not in set(done.file)
        return databases.crystal(source)

    found = screen(ensemble, tmp_path / "out", read=counted, max_atoms=1)
    assert found.file.tolist() == sources()
    expected = screen(ensemble, tmp_path / "whole")
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-6)
    again = screen(ensemble, tmp_path / "out", read=None)  # nothing left to read
    pd.testing.assert_frame_equal(again, found)


def test_shards_are_disjoint_and_complete(ensemble, tmp_path):
    parts = [screen(ensemble, tmp_path / "out", shard=(i, 3)) for i in range(3)]
    assert sorted(pd.concat(parts).file) == sorted(sources())
    whole = screen(ensemble, tmp_path / "whole").set_index("file")
    table = pd.read_parquet(tmp_path / "out").set_index("file")
    assert len(table) == len(whole)
    np.testing.assert_allclose(table.value[whole.index], whole.value, rtol=1e-6)
    pd.testing.assert_frame_equal(screen(ensemble, tmp_path / "out"), pd.concat(parts).set_index(
        "file").loc[sources()].reset_index())  # fmt: skip
    for shard in ((3, 3), (-1, 2)):
        with pytest.raises(DataError, match="no such shard"):
            screen(ensemble, tmp_path / "out", shard=shard)


def test_bad_crystals_have_a_row(ensemble, files, tmp_path, monkeypatch):
    names = [str(files / "SOD.cif"), str(files / "half.cif"), "iza:XYZ", str(files / "none.cif"),
             "iza:CAN", "iza:LTA"]  # fmt: skip

    def read(source):
        if source == "iza:LTA":
            raise ZeroDivisionError("odd")
        return databases.crystal(source)

    monkeypatch.setattr(screening, "PART", 1)  # files with bad crystals only, too
    found = screen(ensemble, tmp_path / "out", names, read=read)
    assert found.file.tolist() == names
    assert found.error.tolist() == ["", *["CrystalError"] * 3, "", "ZeroDivisionError"]
    assert found.value.isna().tolist() == [e != "" for e in found.error]
    assert found.y1.isna().tolist() == [e != "" for e in found.error]
    assert found.cause[2] == "it is no IZA framework"
    assert (found.remedy[1:4] != "").all()
    pd.testing.assert_frame_equal(screen(ensemble, tmp_path / "out", names), found)


def test_warnings_of_the_reader_are_kept(ensemble, files, tmp_path):
    path = tmp_path / "x.cif"
    lines = (files / "CAN.cif").read_text().rstrip().split("\n")
    path.write_text("\n".join(lines[:-5]) + "\n")
    (row,) = screen(ensemble, tmp_path / "out", [str(path)]).itertuples()
    assert "its atoms are not those of its formula" in row.warnings


def test_nothing_to_do(ensemble, tmp_path):
    found = screening.screen([], ensemble, tmp_path / "out")
    assert len(found) == 0
    assert list(found.columns) == list(screening.COLUMNS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file of a crystal"):
        databases.expand(str(tmp_path / "empty"))


def test_results_of_another_model_are_not_mixed(ensemble, model, tmp_path):
    screen(ensemble, tmp_path / "out", sources(CODES[:1]))
    other = x3mat.load_model(model / "0.pt")
    with pytest.raises(DataError, match="results of another model, small"):
        screen(other, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write there"):
        screen(ensemble, tmp_path / "file", sources(CODES[:1]))


def test_several_processes_give_the_same(ensemble, tmp_path, monkeypatch):
    monkeypatch.setattr(screening, "processes", lambda n: {
        "num_workers": 2, "multiprocessing_context": "fork"})  # fmt: skip
    found = screen(ensemble, tmp_path / "a", [*sources(), "iza:XYZ"])
    monkeypatch.undo()
    expected = screen(ensemble, tmp_path / "b", [*sources(), "iza:XYZ"])
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_finds_its_budget_and_gives_the_same(model, ensemble, tmp_path):
    found = screen(x3mat.load_model(model, "cuda"), tmp_path / "a", sources([*CODES, "MFI"]))
    expected = screen(ensemble, tmp_path / "b", sources([*CODES, "MFI"]))
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-4)


def test_means_are_weighted(ensemble):
    windows = [x3mat.sample_windows(databases.iza(code)) for code in CODES[:3]]
    found = screening.means(ensemble.members, windows).numpy()
    for k, w in enumerate(windows):
        np.testing.assert_allclose(found[:, k, 0], ensemble.values(w), rtol=1e-5)


def test_databases_and_folders_by_name(files):
    assert len(databases.expand("iza")) == 253
    assert databases.crystal("IZA:sod").formula == "SiO2"
    assert databases.expand("my.cif") == ["my.cif"]
    assert len(databases.expand(str(files))) == 5
    kinds = ("x.cif", "X.CIF", "POSCAR_1", "contcar.2", "a.vasp", "b.poscar", "c.xyz", "d.extxyz")
    assert all(READ.search(name) for name in kinds)
    assert not any(READ.search(name) for name in ("a.cif.gz", "notes", "x.poscars", "MYPOSCAR"))


def test_command(files, model, tmp_path):
    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["predict", *map(str, arguments), "--model", str(model)])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    out = tmp_path / "out.parquet"
    done = [json.loads(run(files, "iza:LTA", "--out", out, "--shard", shard, "--json").stdout)
            for shard in ("0/2", "1/2")]  # fmt: skip
    assert [(part["crystals"], part["failed"]) for part in done] == [(3, 1), (3, 0)]
    table = pd.read_parquet(out)
    assert len(table) == 6
    single = json.loads(run("iza:LTA", "--json").stdout)
    assert table.set_index("file").value["iza:LTA"] == pytest.approx(single["value"], rel=1e-5)
    assert "6 crystals, 1 of them" in run(files, "iza:LTA", "--out", out).stdout
    assert "no shard" in run("iza:LTA", "--out", out, "--shard", "two", code=1).stderr
    assert len(json.loads(run(files, "--json", code=1).stdout)) == 5


def waits(folder):
    """For a minute, after it has left its number."""
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def test_trainings_end_with_who_called_them(tmp_path):
    """Even if that was killed: nothing goes on unseen, beside a call that resumes it."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
            "from test_screening import side_by_side, waits;"
            "side_by_side(waits, [(Path(sys.argv[2]),)] * 2, 2)")  # fmt: skip
    script = tmp_path / "run.py"
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    folder = tmp_path / "numbers"
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, script, Path(__file__).parent, folder])
    try:
        assert becomes(lambda: len(list(folder.iterdir())) == 2)
    finally:
        parent.kill()
        parent.wait()
    assert becomes(lambda: not any(runs(int(file.name)) for file in folder.iterdir()))


def becomes(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


def runs(pid):
    """Whether there is such a process that has not ended."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def gpus_of_this_process(folder):
    """When both processes are there."""
    (folder / str(os.getpid())).touch()
    for _ in range(1200):
        if len(list(folder.iterdir())) == 2:
            break
        time.sleep(0.05)
    return os.environ["CUDA_VISIBLE_DEVICES"], torch.get_num_threads()


@pytest.mark.parametrize(("devices", "expected"), [
    (1, {"3", "5"}), (3, {"3,5,7", "9,3,5"}), (5, {"3,5,7,9", "5,7,9,3"}),
])  # fmt: skip
def test_trainings_side_by_side_have_gpus_of_their_own(monkeypatch, tmp_path, devices, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,9,-1,11")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # what follows -1 does not count
    found = side_by_side(gpus_of_this_process, [(tmp_path,)] * 2, 2, devices)
    assert {gpus for gpus, _ in found} == expected
    assert {threads for _, threads in found} == {torch.get_num_threads() // 2 or 1}
