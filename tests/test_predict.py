"""Loading ensembles, values with spread, warnings, and what a prediction imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import ABOUT, CONFIG, write

import x3mat
from x3mat import databases, paths
from x3mat.crystal import crystal_from_arrays
from x3mat.predict import (
    MAX_ATOMS,
    Ensemble,
    available_models,
    domain_warnings,
    load_model,
    spread,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    for seed, train in enumerate((["CHA", "SOD"], ["LTA", "SOD"], ["LTA"])):
        write(folder / f"fold{seed}-seed{seed}.pt", seed, train=train)
    return folder


@pytest.fixture(scope="module")
def ensemble(folder):
    return load_model(folder)


def test_value_is_the_mean_over_all_windows_and_members(ensemble):
    crystal = databases.iza("SOD")
    result = x3mat.predict(crystal, ensemble)
    every = x3mat.sample_windows(crystal, CONFIG.radius, CONFIG.step, symmetry=False)
    values = [m.contributions(every).double().mean().item() for m in ensemble.members]
    assert result.value == pytest.approx(np.mean(values), rel=1e-5)
    assert result.std == pytest.approx(np.std(values, ddof=1), rel=1e-3)
    assert result.std > 0
    assert (result.n_windows, result.unit) == (every.n_windows, "g/L")
    assert result.n_orbits < result.n_windows


def test_workers_change_nothing(ensemble):
    windows = ensemble.windows(databases.iza("MFI"))  # of several chunks
    assert len(windows.positions) > 3 * MAX_ATOMS
    together = replace(ensemble, workers=3).contributions(windows)
    assert np.array_equal(together, ensemble.contributions(windows))
    whole = ensemble.members[0].contributions(windows, 10**9)[:, 0].numpy()
    assert np.allclose(together[0], whole, rtol=1e-5)


def test_one_checkpoint_has_no_spread(folder):
    one = load_model(folder / "fold0-seed0.pt")
    assert len(one.members) == 1
    assert np.isnan(x3mat.predict(databases.iza("SOD"), one).std)
    assert np.isnan(spread(np.ones((1, 3)))).all()


def test_file_structure_and_crystal_agree(ensemble, tmp_path):
    crystal = databases.iza("CAN")
    file = tmp_path / "CAN.cif"
    crystal.structure.to(filename=str(file))
    values = [x3mat.predict(s, ensemble).value for s in (crystal, crystal.structure, file)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_members_that_never_saw_a_crystal(ensemble):
    assert ensemble.trained_on("LTA") == 2
    held_out = ensemble.without("LTA")
    assert isinstance(held_out, Ensemble)
    assert [about["seed"] for about in held_out.about] == [0]
    assert len(ensemble.without("MFI").members) == 3
    with pytest.raises(x3mat.ModelError, match="all members were trained on LTA"):
        Ensemble("x", ensemble.members[1:], ensemble.about[1:]).without("LTA")


def test_no_warning_inside_the_domain(ensemble):
    assert domain_warnings(databases.iza("MFI"), ensemble) == []


@pytest.mark.parametrize(("domain", "text"), [
    ({"species": [14]}, "unseen element: no training crystal contains O"),
    ({"density": [1.5, 2.0]}, r"density 1\.4.* g/cm3 is below the range of training, 1.5 to 2"),
    ({"density": [0.5, 1.0]}, "density .* is above"),
    ({"largest_cavity": [2.0, 5.0]}, "largest cavity diameter 10.* Å is above"),
    ({"void_fraction": [0.7, 0.8]}, "void fraction 0.5.* is below"),
])  # fmt: skip
def test_each_warning(ensemble, domain, text):
    about = ({**ABOUT, "domain": {**ABOUT["domain"], **domain}, "train": []},)
    found = domain_warnings(databases.iza("LTA"), Ensemble("x", ensemble.members[:1], about))
    assert len(found) == 1
    assert re.search(text, found[0])


def test_training_crystal_is_noted(ensemble):
    (note,) = domain_warnings(databases.iza("SOD"), ensemble)
    assert note.startswith("2 of 3 members were trained on a crystal called SOD")


def test_foreign_element_is_named(ensemble):
    salt = crystal_from_arrays(5.64 * np.eye(3), [11] * 4 + [17] * 4, [
        [0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0],
        [0.5, 0.5, 0.5], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]], name="salt")  # fmt: skip
    assert "no training crystal contains Na, Cl" in x3mat.predict(salt, ensemble).warnings[0]


# ---------------------------------------------------------------------------------- errors


def test_wrong_name_lists_the_models_there_are(tmp_path, monkeypatch):
    write(tmp_path / "models" / "zeolite-n2" / "a.pt")
    monkeypatch.setattr(paths, "data", lambda: tmp_path)
    assert available_models() == ["zeolite-n2"]
    assert len(load_model("zeolite-n2").members) == 1
    with pytest.raises(x3mat.ModelError, match=r"no such model.*names: zeolite-n2"):
        load_model("zeolite-n3")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_checkpoint(folder, tmp_path, content):
    whole = (folder / "fold0-seed0.pt").read_bytes()
    file = tmp_path / "damaged.pt"
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(x3mat.ModelError, match=r"damaged\.pt: not a readable checkpoint"):
        load_model(file)


@pytest.mark.parametrize(("change", "text"), [
    ({"unit": "mol/kg"}, "b.pt and a.pt differ in unit"),
    ({"config": replace(CONFIG, radius=5.0)}, "differ in radius"),
    ({"columns": ["CO2", "N2"]}, "differ in columns"),
])  # fmt: skip
def test_checkpoints_that_do_not_belong_together(tmp_path, change, text):
    write(tmp_path / "a.pt")
    write(tmp_path / "b.pt", **change)
    with pytest.raises(x3mat.ModelError, match=text):
        load_model(tmp_path)


def test_outputs_are_named(tmp_path):
    config = replace(CONFIG, outputs=2)
    write(tmp_path / "a.pt", config=config, columns=["CO2", "N2"], property="uptake")
    with pytest.raises(x3mat.ModelError, match=r"outputs are CO2, N2. Name one of them: .*:CO2"):
        load_model(tmp_path)
    one, two = (load_model(f"{tmp_path}:{gas}") for gas in ("CO2", "N2"))
    assert (one.property, two.property) == ("CO2 uptake", "N2 uptake")
    crystal = databases.iza("SOD")
    windows = two.windows(crystal)
    both = two.members[0].contributions(windows).double()
    expected = torch.as_tensor(windows.weights / windows.n_windows) @ both
    found = [x3mat.predict(crystal, ensemble).value for ensemble in (one, two)]
    assert found == pytest.approx(expected.tolist())
    assert found[0] != pytest.approx(found[1])


def test_a_prediction_imports_neither_training_nor_plotting(folder, tmp_path):
    file = tmp_path / "SOD.cif"
    databases.iza("SOD").structure.to(filename=str(file))
    code = (
        "import sys, json; from x3mat.cli import app\n"
        f"try: app(['predict', {str(file)!r}, '--model', {str(folder)!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    slow = {"lightning", "pandas", "matplotlib", "pymatgen", "e3nn", "sympy", "numba", "ase"}
    assert "torch" in loaded
    assert not loaded & slow
