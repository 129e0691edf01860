"""Prediction with trained models: ensembles of checkpoints, values with spread, warnings.

Nothing here needs the training stack, so that a prediction starts quickly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from x3mat import paths
from x3mat.crystal import Crystal, read_crystal, symbol
from x3mat.descriptors import describe
from x3mat.errors import ModelError
from x3mat.sampling import Windows, sample_windows

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from x3mat.model import X3Mat

DEFAULT_MODEL = "zeolite-n2"
MAX_ATOMS = 1_000  # atoms of windows at a time: what the caches hold is twice as fast
#: Quantities of ``about["domain"]`` with a range, as warnings call them.
RANGES = {"density": ("density", "g/cm3"), "void_fraction": ("void fraction", ""),
          "largest_cavity": ("largest cavity diameter", "Å")}


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Models of one property that differ in training set (fold) or seed."""

    name: str  # of the model, file or folder that was loaded
    members: tuple[X3Mat, ...]
    about: tuple[dict, ...]  # each checkpoint's application, unit, fold, training crystals, ranges
    output: int = 0  # which of several outputs it is about
    workers: int = 1  # members evaluated at the same time, each in a thread

    @property
    def domain(self) -> dict[str, list]:
        """Elements, and [min, max] of each quantity, over the training crystals of all members."""
        every = [about.get("domain", {}) for about in self.about]
        out = {"species": sorted({int(z) for d in every for z in d.get("species", ())})}
        for key in RANGES:
            known = [d[key] for d in every if key in d]
            if known:
                out[key] = [float(min(low for low, _ in known)), float(max(h for _, h in known))]
        return out

    def trained_on(self, name: str) -> int:
        """Number of members with a training crystal called `name`."""
        return sum(name in about.get("train", ()) for about in self.about)

    def without(self, name: str) -> Ensemble:
        """The members that never saw a crystal called `name`; a ModelError if all members have."""
        keep = [i for i, about in enumerate(self.about) if name not in about.get("train", ())]
        if not keep:
            raise ModelError(self.name, f"all members were trained on {name}",
                             "Train a fold that holds it out.")
        return replace(self, members=tuple(self.members[i] for i in keep),
                       about=tuple(self.about[i] for i in keep))

    def windows(self, crystal: Crystal, step: float | None = None) -> Windows:
        """Windows as the members were trained on, or on a grid with another `step` (Å)."""
        found = sample_windows(crystal, self.config.radius, step or self.config.step)
        if "lattice_gas" not in self.about[0]:
            return found
        from x3mat_gcmc.lattice_gas import told
        return replace(found, told=told(found, self.about[0]["lattice_gas"]))

    def contributions(self, windows: Windows) -> np.ndarray:
        """Contribution of each window according to each member, (members, W), float64."""
        from x3mat.model import contributions
        with ThreadPoolExecutor(min(self.workers, len(self.members))) as pool:
            y = contributions(self.members, [windows], MAX_ATOMS, pool.map)
        return y[..., self.output].double().cpu().numpy()

    def values(self, windows: Windows) -> np.ndarray:
        """Each member's value of the property, (members,): Ŷ = Σ m_w y_w / Σ m_w."""
        return self.contributions(windows) @ windows.weights / windows.weights.sum()

    config = property(lambda self: self.members[0].config)
    unit = property(lambda self: self.about[0]["unit"])
    conditions = property(lambda self: self.about[0].get("conditions", ""))
    column = property(lambda self: self.about[0].get("columns", ("",))[self.output])
    property = property(lambda self: " ".join(  # the last: it hides the built-in
        [self.column] * (self.config.outputs > 1) + [self.about[0]["property"]]))


@dataclass(frozen=True)
class Prediction:
    """A predicted property of one crystal."""

    name: str  # of the crystal
    property: str
    unit: str
    value: float  # mean over the ensemble's members
    std: float  # sample standard deviation over the members, a part of the error; nan for one
    n_windows: int  # grid points
    n_orbits: int  # symmetry-inequivalent ones
    warnings: tuple[str, ...]  # why to distrust the value: outside the domain of training


def available_models() -> list[str]:
    """Names of the models that are shipped: the folders of checkpoints in ``data/models``."""
    folder = paths.data() / "models"
    return sorted({p.parent.relative_to(folder).as_posix() for p in folder.glob("**/*.pt")})


def load_model(name_or_path: str | Path = DEFAULT_MODEL, device: str = "cpu") -> Ensemble:
    """Load a trained model.

    Parameters
    ----------
    name_or_path : str or path
        Name of a shipped model (see :func:`available_models`), a checkpoint (``.pt``), or a
        folder of checkpoints, which become one ensemble. Of a model with several outputs, name
        and output, for instance "mof-co2o2n2:CO2".
    device : str; of torch

    Raises a ModelError if there is no such model (the message lists those there are), a checkpoint
    is damaged, or checkpoints do not belong together."""
    from x3mat.model import load_checkpoint
    name, column = str(name_or_path), ""
    if not Path(name).exists():
        name, _, column = name.partition(":")
    for path in (Path(name), paths.data() / "models" / name):
        if files := [path] if path.is_file() else sorted(path.glob("*.pt")):
            break
    else:
        known = ", ".join(available_models()) or "none is installed"
        raise ModelError(str(name_or_path), "there is no such model",
                         f"Give the path of a checkpoint, or one of these names: {known}.")
    loaded = [load_checkpoint(file) for file in files]
    kinds = [{**vars(model.config), **about} for model, about in loaded]
    for file, kind in zip(files, kinds, strict=True):
        if not {"property", "unit"} <= set(kind):
            raise ModelError(file, "it does not say what it predicts", "Train it again.")
        shared = ("application", "property", "unit", "conditions", "columns", "radius", "step",
                  "encoding")
        if differing := [key for key in shared if kind.get(key) != kinds[0].get(key)]:
            raise ModelError(path, f"{file.name} and {files[0].name} differ in"
                             f" {', '.join(differing)}", "Put only one kind of model in a folder.")
    columns = list(kinds[0].get("columns", [""]))
    if column not in columns and (column or len(columns) > 1):
        raise ModelError(name_or_path, f"its outputs are {', '.join(columns)}",
                         f"Name one of them: {name}:{columns[0]}")
    return Ensemble(Path(name_or_path).name, tuple(m.to(device) for m, _ in loaded),
                    tuple(about for _, about in loaded), columns.index(column) if column else 0)


def predict(structure: str | Path | Crystal | Structure,
            model: str | Path | Ensemble = DEFAULT_MODEL) -> Prediction:
    """Predict a property of a crystal.

    Parameters
    ----------
    structure : path, Crystal or pymatgen Structure; as :func:`x3mat.read_crystal` takes it
    model : str, path or Ensemble; as :func:`load_model` takes it, or what it returned

    Raises a CrystalError if the crystal cannot be used, a ModelError if the model cannot."""
    return predicted(structure, model)[-1]


def predicted(
    structure: str | Path | Crystal | Structure, model: str | Path | Ensemble
) -> tuple[Crystal, Ensemble, Windows, np.ndarray, Prediction]:
    """Crystal, ensemble, windows, contributions, (members, W), and the prediction they make."""
    crystal = structure if isinstance(structure, Crystal) else read_crystal(structure)
    ensemble = model if isinstance(model, Ensemble) else load_model(model)
    windows = ensemble.windows(crystal)
    members = ensemble.contributions(windows)
    values = members @ windows.weights / windows.weights.sum()
    return crystal, ensemble, windows, members, Prediction(
        crystal.name, ensemble.property, ensemble.unit, float(values.mean()), float(spread(values)),
        windows.n_windows, windows.n_orbits, tuple(domain_warnings(crystal, ensemble)))


def spread(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over the first axis; nan where that has one member.

    >>> float(spread(np.array([1.0, 3.0]))), float(spread(np.array([1.0])))
    (1.4142135623730951, nan)
    """
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    return values.std(axis=0, ddof=1)


def domain_warnings(crystal: Crystal, ensemble: Ensemble) -> list[str]:
    """What is unlike the crystals that the ensemble was trained on; empty if nothing is.

    A value outside the range of the training crystals, or an element that none of them has, makes
    the prediction an extrapolation. That nothing is outside does not make it right."""
    domain, out = ensemble.domain, []
    unseen = [symbol(z) for z in np.unique(crystal.species) if int(z) not in domain["species"]]
    if unseen and domain["species"]:
        out.append(f"unseen element: no training crystal contains {', '.join(unseen)}")
    found = describe(crystal) if {"void_fraction", "largest_cavity"} & set(domain) else crystal
    for key, (label, unit) in RANGES.items():
        low, high = domain.get(key, (-np.inf, np.inf))
        value = getattr(found, key, low)
        if not low <= value <= high:
            side = "below" if value < low else "above"
            out.append(f"{label} {value:.3g} {unit}".rstrip()
                       + f" is {side} the range of training, {low:.3g} to {high:.3g}")
    seen = ensemble.trained_on(crystal.name)
    if seen:
        out.append(f"{seen} of {len(ensemble.members)} members were trained on a crystal called"
                   f" {crystal.name}: if it is this one, the value is partly a fit to its label")
    return out
