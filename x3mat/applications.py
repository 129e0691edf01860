"""Applications: a property, the crystals and labels that teach it, and how they are split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from x3mat import databases, paths
from x3mat.crystal import SYMPREC, Crystal
from x3mat.errors import DataError


@dataclass(frozen=True)
class Fold:
    """One split: four fifths for training; the rest in two halves.

    Each half is the test set of a model whose choices were made on the other half."""

    train: tuple[str, ...]
    halves: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def rest(self) -> tuple[str, ...]:
        return self.halves[0] + self.halves[1]


@dataclass(frozen=True)
class Application:
    """A property to be learned, as ``data/<name>/application.json`` states it.

    Labels are read from ``data/<name>/labels.csv``, where some columns may be ``renamed``. If they
    are others' and may not appear among results, ``source`` says where in the folder of external
    data they are: the ``file`` (CSV or npz), its column with the ``name`` of crystals, which of its
    columns ours are, and where to get it (``remedy``). ``hyper_parameters`` are those that its
    training sets differently from :class:`x3mat.training.TrainConfig`, the model's under "model".
    ``drawn`` says that there are thousands of crystals: windows are cut when they are needed, and
    there is one split, whose first half of the rest is for validation and whose second half is the
    test set; further entries of ``folds.json`` are other splits of the same crystals. A model
    remembers the range of the descriptors ``ranges`` in its training set, to warn outside of it."""

    name: str  # also the folder of its data, results and models
    property: str
    unit: str
    conditions: str
    columns: tuple[str, ...]  # of the table of labels, with the targets, one for each output
    database: str  # of its crystals, one of x3mat.databases.DATABASES
    hyper_parameters: dict
    source: dict | None = None
    renamed: dict | None = None
    ranges: tuple[str, ...] = ("density", "void_fraction", "largest_cavity")
    drawn: bool = False

    @property
    def folder(self) -> Path:
        return paths.data() / self.name

    def crystal(self, name: str, symprec: float = SYMPREC) -> Crystal:
        """The crystal called ``name`` in the table of labels."""
        return databases.DATABASES[self.database][1](name, symprec=symprec)

    def labels(self) -> pd.DataFrame:
        """The table of labels, one row per crystal, indexed by name."""
        path, remedy = self.folder / "labels.csv", "restore it or simulate it"
        if self.source:
            path, remedy = paths.external() / self.source["file"], self.source["remedy"]
        if not path.is_file():
            raise DataError(path, "the table of labels is missing", remedy)
        if not self.source:
            return pd.read_csv(path, index_col=0).rename(columns=self.renamed or {})
        theirs = {"name": self.source["name"], **self.source["columns"]}
        with np.load(path) if path.suffix == ".npz" else nullcontext(pd.read_csv(path)) as file:
            table = pd.DataFrame({ours: file[column] for ours, column in theirs.items()})
        return table.set_index("name").astype(float)

    def copies(self, names: Sequence[str], number: int) -> pd.DataFrame:
        """Labels of ``number`` copies NAME~1, NAME~2, ... under random strain of each crystal."""
        wanted = [f"{name}~{k}" for k in range(1, number + 1) for name in names]
        try:
            return pd.read_csv(self.folder / "strained.csv", index_col=0).loc[wanted]
        except (FileNotFoundError, KeyError):
            raise DataError(self.name, f"not every crystal has {number} strained copies",
                            "set fewer copies, or copies=0") from None

    def folds(self) -> list[Fold]:
        """The splits of ``data/<name>/folds.json``."""
        found = json.loads((self.folder / "folds.json").read_text())["folds"]
        return [Fold(tuple(f["train"]), tuple(map(tuple, f["halves"]))) for f in found]


def _read(path: Path) -> Application:
    stated = json.loads(path.read_text(encoding="utf-8"))
    lists = {k: tuple(v) for k, v in stated.items() if isinstance(v, list)}
    return Application(path.parent.name, **{**stated, **lists})


APPLICATIONS = {path.parent.name: _read(path)
                for path in sorted(paths.data().glob("*/application.json"))}


def application(name: str) -> Application:
    """The application called ``name``.

    >>> application("zeolite-n2").unit
    'g/L'
    """
    if name not in APPLICATIONS:
        raise DataError(name, "there is no such application", f"choose from {list(APPLICATIONS)}")
    return APPLICATIONS[name]
