"""One command for the result of each application: every step exists and takes what it is given."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import mof_labels
import pytest
import rebuild

from x3mat.applications import APPLICATIONS


@pytest.fixture
def calls(monkeypatch, tmp_path):
    monkeypatch.setenv("X3MAT_DATA", str(tmp_path))
    monkeypatch.setattr(rebuild, "ROOT", tmp_path)
    found = []

    def call(command, cwd):
        found.append(command)
        return int("summarize" in " ".join(map(str, command)) and len(found) in rebuild.FAILS)

    monkeypatch.setattr(rebuild, "FAILS", (), raising=False)
    monkeypatch.setattr(subprocess, "call", call)
    return found


@pytest.mark.parametrize("name", list(APPLICATIONS))
def test_every_step_exists_and_has_its_options(name, calls):
    assert rebuild.main([name, "--labels", "--device", "cuda", "--jobs", "3"]) == 0
    root = Path(__file__).parents[1]
    assert len(calls) >= 5
    for program, first, *options in calls:
        source = root / first
        if Path(program).name == "x3mat":
            assert first == "train"
            source = root / "x3mat" / "cli.py"
        if Path(program).name in ("x3mat", "python", "papermill"):
            assert Path(program).exists() or Path(program).name == "python"
        assert source.is_file()
        if Path(program).name == "papermill":
            continue
        text = source.read_text(encoding="utf-8")
        for option in options:
            if option.startswith("--"):
                word = option.removeprefix("--")
                assert re.search(rf"--{word}\b|^ +{word}: Annotated", text, re.M), (first, option)
    passes = sum("run" in map(str, call) for call in calls)
    assert passes == (len(mof_labels.PLANS[name].passes) if name in mof_labels.PLANS else 0)
    assert [Path(program).name for program, *_ in calls][-1] == "papermill"


def test_what_fails_ends_it(calls, monkeypatch, capsys):
    monkeypatch.setattr(rebuild, "FAILS", (2,))
    assert rebuild.main(["mof-co2n2"]) == 1
    assert [Path(call[1]).name for call in calls] == ["train", "summarize.py"]
    assert "call again" in capsys.readouterr().err


def test_nothing_is_run_to_list_it(calls, capsys):
    assert rebuild.main(["qmof-gap", "--list"]) == 0
    assert not calls
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("x3mat train qmof-gap --seed 0")
    assert lines[-1].startswith("papermill notebooks/05_qmof_gap.ipynb")


def test_labels_of_others_need_a_folder(monkeypatch, capsys):
    monkeypatch.delenv("X3MAT_DATA", raising=False)
    assert rebuild.main(["qmof-gap", "--labels", "--list"]) == 1
    assert "X3MAT_DATA: the variable is not set" in capsys.readouterr().err
