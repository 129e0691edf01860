"""Where the models of qmof-gap err, and what their spread knows of it.

Errors of each seed and of the mean over the seeds, on both halves of the rest, from all windows of
each crystal as the records of the training have them. Intervals of 90 % are fitted on the
validation half (a factor for the spread of the members, or one width for all crystals) and counted
on the test half. The labels are QMOF's and not ours to ship, while the predictions are shipped: so
nothing is written from which the label of a crystal could be told. Of the ten worst crystals the
errors are rounded to whole eV, and pairs of label and prediction are counted in small squares only
where there are several of them. It takes half a minute.

With `--displaced` it summarizes instead the records of networks that learned from crystals whose
atoms were displaced at random, on the split without look-alikes (fold 0) and the random one (fold
1): errors on both halves, and the history of each run.

examples:
  X3MAT_DATA=folder python tools/qmof_errors.py
  for run in "--fold 0 --seed 0 --seed 1 --seed 2 --jobs 3" "--fold 1 --seed 0"; do
      X3MAT_DATA=folder x3mat train qmof-gap $run --set noise=0.05 --set epochs=34 \\
          --models runs/models --records runs/records
  done
  X3MAT_DATA=folder python tools/qmof_errors.py --displaced runs/records

Writes data/results/qmof-gap/errors.json, or data/results/qmof-gap/displaced.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from intervals import intervals
from pymatgen.core import Element
from scipy.stats import spearmanr

from x3mat import paths, results
from x3mat.applications import application

NAME, HALVES, WORST = "qmof-gap", ("validation", "test"), 10
OPEN_3D = {"V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu"}
FINE, COARSE, FEW = 0.1, 0.5, 3  # eV, eV, crystals: squares of the parity plot


def predictions(folder: Path, fold: str = "fold0") -> pd.DataFrame:
    """All crystals of the rest of a fold: half, label, each seed, their mean and spread."""
    files = sorted(folder.glob(f"{fold}-seed*.json"))
    runs = [pd.DataFrame(results.read_json(f)["predictions"]).set_index("name") for f in files]
    table = pd.DataFrame({
        f"seed{i}": [p[0] for p in run.predicted.loc[runs[0].index]] for i, run in enumerate(runs)
    }, index=runs[0].index)  # fmt: skip
    app = application(NAME)
    table = table.assign(
        half=runs[0].half, label=app.labels()[app.columns[0]][table.index],
        predicted=table.mean(axis=1), spread=table.std(axis=1),
    )  # fmt: skip
    table["error"], table["size"] = (e := table.predicted - table.label), e.abs()
    return table


def described(table: pd.DataFrame) -> pd.DataFrame:
    """The table with composition, number of atoms, kind of metal, and whether electrons are odd."""
    rows = []
    for name in table.index:
        count = Counter(application(NAME).crystal(name, symprec=0.0).species.tolist())
        units, present = math.gcd(*count.values()), [Element.from_Z(z) for z in sorted(count)]
        rows.append({
            "n_atoms": sum(count.values()), "elements": [e.symbol for e in present],
            "composition": " ".join(f"{e.symbol}{count[e.Z]}" for e in present),
            "odd": sum(z * n for z, n in count.items()) // units % 2 == 1,
            "kind": "actinides" if any(e.is_actinoid for e in present)
            else "lanthanides" if any(e.is_lanthanoid for e in present)
            else "open 3d shells" if OPEN_3D & {e.symbol for e in present} else "others",
        })  # fmt: skip
    return table.join(pd.DataFrame(rows, index=table.index))


def statistics(label: pd.Series, predicted: pd.Series) -> dict:
    """Errors of some crystals."""
    error, deviation = predicted - label, label - label.mean()
    return {
        "n": len(label), "mae": error.abs().mean(), "median_error": error.abs().median(),
        "rmse": np.sqrt((error**2).mean()), "bias": error.mean(),
        "r2": 1 - (error**2).sum() / (deviation**2).sum(),
    }  # fmt: skip


def parity(label: np.ndarray, predicted: np.ndarray) -> dict:
    """Counts of crystals in squares: [row of label, row of predicted, n].

    Squares of 0.1 eV that have fewer than three crystals are counted in squares of 0.5 eV, those of
    three or more are not.
    """
    rows = pd.DataFrame({"label": label, "predicted": predicted}).clip(0, 6.99)
    fine = (rows / FINE).astype(int)
    several = fine.groupby(["label", "predicted"]).label.transform("size") >= FEW
    out: dict = {"few": FEW}
    for name, step, part in (("fine", FINE, rows[several]), ("coarse", COARSE, rows[~several])):
        counts = (part / step).astype(int).groupby(["label", "predicted"]).size()
        out[name] = {"step_eV": step, "counts": [[i, j, n] for (i, j), n in counts.items()]}
    return out


def half(part: pd.DataFrame) -> dict:
    """Errors on one half of the rest: of the mean over the seeds, and of each."""
    draws = np.random.default_rng(0).integers(len(part), size=(2_000, len(part)))
    median = np.median(part.label)
    return {
        **statistics(part.label, part.predicted),
        "interval": np.quantile(part["size"].to_numpy()[draws].mean(1), [0.025, 0.975]),
        "spearman_of_spread_and_error": spearmanr(part.spread, part["size"]).statistic,
        "mae_of_median": (part.label - median).abs().mean(),
        "parity": parity(part.label.to_numpy(), part.predicted.to_numpy()),
        "seeds": [statistics(part.label, part[c]) for c in part if c.startswith("seed")],
    }  # fmt: skip


def groups(test: pd.DataFrame) -> dict:
    """Errors by what the crystals are."""
    def of(key: pd.Series) -> dict:
        return {str(name): {"n": len(part), "mae": part["size"].mean(),
                            "median_error": part["size"].median(), "bias": part.error.mean(),
                            "mean_label": part.label.mean()}
                for name, part in test.groupby(key, observed=True)}  # fmt: skip

    atoms = pd.qcut(test.n_atoms, 4)
    others = test.odd.map({True: "odd", False: "even"}).where(test.kind == "others")
    return {
        "kind": of(test.kind), "electrons_of_others": of(others),
        "quarters_of_n_atoms": [
            {"most_atoms": int(test.n_atoms[atoms == key].max()), **found}
            for key, found in zip(atoms.cat.categories, of(atoms.cat.codes).values(), strict=True)
        ],
        "thirds_of_gap": list(of(pd.qcut(test.label, 3, labels=False)).values()),
    }  # fmt: skip


def worst(test: pd.DataFrame) -> dict:
    """The worst crystals of the test half, without what would tell their labels."""
    rows = test.nlargest(WORST, "size")
    return {
        "gaps_below_eV": math.ceil(10 * rows.label.max()) / 10, "odd": int(rows.odd.sum()),
        "too_high": int((rows.error > 0).sum()), "mae": round(rows["size"].mean(), 1),
        "least_error_in_spreads": math.floor((rows["size"] / rows.spread).min()),
        "crystals": [
            {"name": name, "error_eV": round(row["size"]), "odd_electrons": bool(row.odd),
             "side": "too high" if row.error > 0 else "too low", "n_atoms": int(row.n_atoms),
             "composition": row.composition, "elements": row.elements}
            for name, row in rows.iterrows()
        ],
    }  # fmt: skip


def errors() -> dict:
    """Content of errors.json."""
    table = predictions(paths.results(NAME) / "runs")
    parts = [table[table.half == i] for i in (0, 1)]
    test = described(parts[1])
    return {
        "unit": application(NAME).unit, "fold": 0,
        "members": sum(c.startswith("seed") for c in table),
        **dict(zip(HALVES, map(half, parts), strict=True)),
        "intervals": intervals(*parts), "groups": groups(test), "worst": worst(test),
    }  # fmt: skip


def displaced(folder: Path) -> dict:
    """Errors of the runs of a folder on both halves of the rest, by fold."""
    found = {}
    for fold in sorted({path.name.partition("-")[0] for path in folder.glob("fold*.json")}):
        records = [results.read_json(path) for path in sorted(folder.glob(f"{fold}-seed*.json"))]
        table = predictions(folder, fold)
        halves = [part for _, part in table.groupby("half")]
        runs = []
        for i, record in enumerate(records):
            mae = {half: (part[f"seed{i}"] - part.label).abs().mean()
                   for half, part in zip(HALVES, halves, strict=True)}  # fmt: skip
            about = record["provenance"]
            runs.append({"seed": record["config"]["seed"], **mae, "n_train": record["n_train"],
                         "history": record["history"], "wall_s": about["wall_s"],
                         "finished_on": about["hardware"]})  # fmt: skip
        together = {half: {"mae": np.mean([run[half] for run in runs]),
                           "mae_of_mean_over_seeds": part["size"].mean(), "n": len(part)}
                    for half, part in zip(HALVES, halves, strict=True)}  # fmt: skip
        config = {k: v for k, v in records[0]["config"].items() if k != "seed"}
        found[fold] = {"runs": runs, "config": config, **together}
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--displaced", type=Path, metavar="FOLDER", help="of records; see above")
    folder = parser.parse_args().displaced
    start = time.perf_counter()
    if folder:
        results.write(f"{NAME}/displaced.json", displaced(folder), seed=None,
                      command="python tools/qmof_errors.py --displaced runs/records",
                      wall_s=time.perf_counter() - start)  # fmt: skip
        return
    payload = errors()
    results.write(f"{NAME}/errors.json", payload, seed=None,
                  command="python tools/qmof_errors.py", wall_s=time.perf_counter() - start)
    for name in HALVES:
        del payload[name]["parity"]
    print(json.dumps(results.plain(payload), indent=1))


if __name__ == "__main__":
    main()
