"""Applications: a property, the crystals and labels that teach it, and how they are split."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from x3mat import databases, paths
from x3mat.crystal import Crystal
from x3mat.errors import DataError


@dataclass(frozen=True)
class Fold:
    """One split: four fifths for training; the rest in two halves.

    Each half is the test set of a model whose choices were made on the other half.
    """

    train: tuple[str, ...]
    halves: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def rest(self) -> tuple[str, ...]:
        return self.halves[0] + self.halves[1]


@dataclass(frozen=True)
class Application:
    """A property to be learned.

    ``hyper_parameters`` are those that its training sets differently from
    :class:`x3mat.training.TrainConfig`, the model's under "model". Where the table of labels is not
    ours, so that no label may appear among results, ``table`` gives it, else
    ``data/<name>/labels.csv``. ``drawn`` says that there are thousands of crystals: windows are cut
    when they are needed, and there is one split, whose first half of the rest is for validation and
    whose second half is the test set; further entries of ``folds.json`` are other splits of the
    same crystals. A model remembers the range of the descriptors ``ranges`` in its training set, to
    warn outside of it.
    """

    name: str  # also the folder of its data, results and models
    property: str
    unit: str
    conditions: str
    columns: tuple[str, ...]  # of the table of labels, with the targets, one for each output
    crystal: Callable[[str], Crystal]  # of a name in the table's first column
    hyper_parameters: dict
    table: Callable[[], pd.DataFrame] | None = None
    ranges: tuple[str, ...] = ("density", "void_fraction", "largest_cavity")
    drawn: bool = False

    @property
    def folder(self) -> Path:
        return paths.data() / self.name

    def labels(self) -> pd.DataFrame:
        """The table of labels, one row per crystal, indexed by name."""
        if self.table:
            return self.table()
        path = self.folder / "labels.csv"
        if not path.exists():
            raise DataError(path, "the table of labels is missing", "restore it or simulate it")
        return pd.read_csv(path, index_col=0)

    def folds(self) -> list[Fold]:
        """The splits of ``data/<name>/folds.json``."""
        found = json.loads((self.folder / "folds.json").read_text())["folds"]
        return [Fold(tuple(f["train"]), tuple(map(tuple, f["halves"]))) for f in found]


ZEOLITE_N2 = Application(
    name="zeolite-n2", property="N2 uptake", unit="g/L", conditions="298 K, 1 bar, pure silica",
    columns=("n2_g_L",), crystal=databases.iza,
    hyper_parameters={
        "epochs": 90, "crystals_per_step": 4, "windows_per_crystal": 48, "refine": 2,
        "learning_rate": 3e-3, "weight_decay": 0.01, "ema": 0.995,
        "model": {"l_max": 2, "m_max": 2, "layers": 2, "channels": 32, "cutoff": 3.5},
    },
)

QMOF_GAP = Application(
    name="qmof-gap", property="band gap", unit="eV", conditions="PBE, relaxed structure of QMOF",
    columns=("bandgap_pbe_eV",), crystal=databases.qmof, table=databases.qmof_table,
    ranges=("density",), drawn=True,
    hyper_parameters={
        "epochs": 24, "crystals_per_step": 32, "windows_per_crystal": 4,
        "learning_rate": 2e-3, "weight_decay": 0.01, "ema": 0.999, "max_atoms": 30_000,
        "model": {"l_max": 2, "m_max": 2, "layers": 2, "channels": 64, "cutoff": 3.5,
                  "radius": 8.0},
    },
)

APPLICATIONS = {a.name: a for a in (ZEOLITE_N2, QMOF_GAP)}


def application(name: str) -> Application:
    """The application called ``name``.

    >>> application("zeolite-n2").unit
    'g/L'
    """
    if name not in APPLICATIONS:
        raise DataError(name, "there is no such application", f"choose from {list(APPLICATIONS)}")
    return APPLICATIONS[name]
