"""The command line: output, JSON, bad input."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import x3mat
from x3mat import applications, databases
from x3mat.cli import app

PREDICTION = ["file", "property", "unit", "value", "std", "n_windows", "n_orbits", "warnings"]


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for code in ("SOD", "CAN"):
        databases.iza(code).structure.to(filename=str(folder / f"{code}.cif"))
    (folder / "empty.cif").write_text("")
    (folder / "half.cif").write_text((folder / "SOD.cif").read_text()[:200])
    (folder / "notes.txt").write_text("no crystal")
    return folder


@pytest.mark.parametrize("command", [
    (), ("windows",), ("predict",), ("explain",), ("train",),
    ("data", "list"), ("data", "describe"), ("data", "load"),
])  # fmt: skip
def test_every_command_has_help_with_examples(command):
    text = run(*command, "--help").output
    assert "Usage" in text
    assert not command or "x3mat " + " ".join(command) in text.split("Example", 1)[1]


def test_bench_is_a_program_of_the_repository(monkeypatch, capfd):
    run("bench", "--help")
    assert "x3mat bench --device cpu --json" in capfd.readouterr().out
    monkeypatch.setattr("x3mat.paths.root", lambda: None)
    assert "needs the repository" in run("bench", "--help", code=1).output


# --------------------------------------------------------------------------------- windows


def test_windows_json(files):
    file = files / "SOD.cif"
    result = json.loads(run("windows", file, "--json").stdout)
    expected = x3mat.sample_windows(databases.iza("SOD"))
    assert list(result) == ["file", "formula", "n_atoms", "space_group", "grid", "n_windows",
                            "n_orbits", "atoms_per_window", "seconds"]
    assert result["file"] == str(file)
    assert (result["formula"], result["n_atoms"]) == ("SiO2", 36)
    assert result["space_group"] == "Im-3m (229)"
    assert tuple(result["grid"]) == expected.grid
    assert (result["n_windows"], result["n_orbits"]) == (expected.n_windows, expected.n_orbits)
    assert set(result["atoms_per_window"]) == {"min", "median", "max"}
    every = json.loads(run("windows", file, "--json", "--no-symmetry").stdout)
    assert every["n_orbits"] == every["n_windows"] == result["n_windows"]
    assert every["atoms_per_window"] == result["atoms_per_window"]


def test_windows_options_and_text(files):
    small = json.loads(run("windows", "iza:SOD", "--radius", 3, "--step", 1, "--json").stdout)
    assert small["n_windows"] > 700
    assert small["atoms_per_window"]["max"] < 15
    assert "SiO2, 36 atoms, Im-3m (229)" in run("windows", files / "SOD.cif").stdout


def test_one_bad_file_does_not_stop_the_others(files):
    names = [files / name for name in ("SOD.cif", "empty.cif", "nothing.cif", "CAN.cif")]
    result = run("windows", *names, "iza:XYZ", "--json", code=1)
    listed = json.loads(result.stdout)
    assert [entry["file"] for entry in listed] == [*map(str, names), "iza:XYZ"]
    assert ["error" in entry for entry in listed] == [False, True, True, False, True]
    assert listed[1]["error"]["type"] == "CrystalError"
    assert listed[1]["error"]["cause"] == "the file is empty"
    assert result.stderr.count("error: ") == 3


@pytest.mark.parametrize("name", ["empty.cif", "half.cif", "notes.txt", "nothing.cif"])
def test_bad_input_gives_the_message_and_exit_code_1(files, name):
    result = run("windows", files / name, code=1)
    assert result.stderr.startswith(f"error: {files / name}: ")
    assert result.stdout == ""


def test_bad_options(files):
    assert "radius" in run("windows", files / "SOD.cif", "--radius", -1, code=1).stderr
    assert run("windows", code=2)
    assert run("windows", files / "SOD.cif", "--radius", "six", code=2)


# ------------------------------------------------------------------------- predict, explain


def test_predict(files, model):
    one = json.loads(run("predict", files / "SOD.cif", "--model", model, "--json").stdout)
    assert list(one) == PREDICTION
    expected = x3mat.predict(files / "SOD.cif", model)
    assert one["value"] == pytest.approx(expected.value)
    assert one["std"] == pytest.approx(expected.std)
    assert one["warnings"] == list(expected.warnings)
    assert "SOD" in one["warnings"][0]
    text = run("predict", files / "SOD.cif", "--model", model).stdout
    assert f"N2 uptake {expected.value:.3f} ± {expected.std:.3f} g/L" in text
    assert "warning: " in text
    several = run("predict", files / "SOD.cif", files / "half.cif", "--model", model, "--json",
                  code=1)  # fmt: skip
    good, bad = json.loads(several.stdout)
    assert good == one
    assert bad["error"]["type"] == "CrystalError"


def test_single_model_has_null_spread(files, model):
    result = run("predict", files / "SOD.cif", "--model", model / "0.pt", "--json")
    assert json.loads(result.stdout)["std"] is None


def test_wrong_model(files, tmp_path):
    result = run("predict", files / "SOD.cif", "--model", "no-model", code=1)
    assert result.stderr.startswith("error: no-model: there is no such model")
    (tmp_path / "x.pt").write_bytes(b"damaged")
    assert "not a readable" in run("explain", files / "SOD.cif", "--model", tmp_path, code=1).stderr


def test_explain_writes_three_files(files, model, tmp_path):
    result = json.loads(run("explain", files / "CAN.cif", "--model", model, "--out",
                            tmp_path / "maps", "--json").stdout)  # fmt: skip
    assert list(result) == [*PREDICTION, "sites", "files"]
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == [
        "CAN-sites.csv", "CAN.cube", "CAN.html"]  # fmt: skip
    assert result["sites"][0]["rank"] == 1
    (tmp_path / "file").write_text("")
    result = run("explain", files / "CAN.cif", "--model", model, "--out", tmp_path / "file", code=1)
    assert "cannot write there" in result.stderr


# ---------------------------------------------------------------------------- train, data


def test_train_on_a_few_crystals(tmp_path):
    small = ["epochs=1", "crystals_per_step=2", "windows_per_crystal=2", "model.l_max=1",
             "model.m_max=1", "model.channels=8", "model.heads=2", "model.layers=1"]  # fmt: skip
    options = [x for change in small for x in ("--set", change)]
    result = run("train", "zeolite-n2", "--fold", 0, "--limit", 2, *options, "--device", "cpu",
                 "--models", tmp_path / "m", "--records", tmp_path / "r", "--runs", tmp_path / "s",
                 "--json")  # fmt: skip
    (record,) = json.loads(result.stdout)
    assert record["fold"] == 0
    assert len(record["predictions"]) == 4
    ensemble = x3mat.load_model(tmp_path / "m")
    assert ensemble.unit == "g/L"
    assert set(ensemble.domain) == {"species", "density", "void_fraction", "largest_cavity"}
    name = ensemble.about[0]["train"][0]
    assert ensemble.trained_on(name) == 1
    assert x3mat.predict(databases.iza(name), ensemble).warnings[-1].startswith("1 of 1 members")


@pytest.mark.parametrize(("arguments", "text"), [
    (["no-application"], "there is no such application"),
    (["zeolite-n2", "--fold", "9"], "there is no fold 9"),
    (["zeolite-n2", "--set", "epoch=3"], "not a hyper-parameter"),
    (["zeolite-n2", "--set", "epochs=many"], "is not a int"),
])  # fmt: skip
def test_train_refuses(arguments, text):
    assert text in run("train", *arguments, code=1).stderr


def test_data():
    listed = json.loads(run("data", "list", "--json").stdout)
    assert [a["name"] for a in listed] == list(applications.APPLICATIONS)
    described = json.loads(run("data", "describe", "zeolite-n2", "--json").stdout)
    assert described["n_crystals"] == 253
    assert len(described["folds"]) == 5
    table = applications.application("zeolite-n2").labels()
    rows = json.loads(run("data", "load", "zeolite-n2", "--json").stdout)
    assert len(rows) == len(table)
    assert run("data", "load", "zeolite-n2").stdout.splitlines()[0].startswith("code,n2_g_L")
    assert "there is no such application" in run("data", "load", "nothing", code=1).stderr
