"""Where the models of mof-n2 err, what their spread knows of it, and whether labels are to blame.

The mean over the seeds is compared with the labels, on both halves of the rest. Intervals of 90 %
are fitted on the validation half (a factor for the spread of the members, or one width for all
crystals) and counted on the test half. The result is data/results/mof-n2/errors.json; it is made of
the files that `x3mat train mof-n2` wrote, in half a minute.

With --longer the ten worst crystals of the test half, and ten drawn at random from it, are
simulated again: with another seed, and four times as long as most labels. Minutes for each; rows
are appended to longer.jsonl below --runs, so that it may be killed and called again. The result is
data/results/mof-n2/longer.json.

examples:
  python tools/mof_n2_errors.py
  NUMBA_NUM_THREADS=1 python tools/mof_n2_errors.py --longer
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import mof_labels
import numpy as np
import pandas as pd
from intervals import intervals
from pymatgen.core import Element
from scipy.stats import spearmanr
from tqdm import tqdm

from x3mat import databases, paths, results
from x3mat.applications import application
from x3mat_gcmc import Framework, gcmc, shards

NAME, HALVES, WORST = "mof-n2", ("validation", "test"), 10
NITROGEN = 3.64  # Å, kinetic diameter; a pore with a narrower limiting diameter is closed to it
LONGER = replace(mof_labels.PLANS[NAME].passes[0], equilibration=1000, cycles=2000, seed=2)
GEOMETRY = {"LCD": "LCD_A", "PLD": "PLD_A", "cm3_g": "density_g_cm3"}  # as core-mof calls them


def predictions(name: str = NAME, output: int = 0, front: str = "") -> pd.DataFrame:
    """All crystals of the rest of fold 0: half, label, mean and spread of the seeds, geometry.

    Of several outputs one, whose columns in the table of labels begin with `front`.
    """
    files = sorted((paths.results(name) / "runs").glob("fold0-seed*.json"))
    runs = [pd.DataFrame(results.read_json(f)["predictions"]).set_index("name") for f in files]
    names = runs[0].index
    members = np.stack([[p[output] for p in run.predicted.loc[names]] for run in runs], 1)
    table = pd.DataFrame({
        "half": runs[0].half, "label": [y[output] for y in runs[0].label],
        "predicted": members.mean(1), "spread": members.std(1, ddof=1),
    })  # fmt: skip
    table["error"], table["size"] = (e := table.predicted - table.label), e.abs()
    made = application(name).labels().loc[names]
    share = made[f"{front}error_mol_per_kg"] / made[f"{front}mol_per_kg"]
    table["label_error"], table["pass"] = share * table.label, made["pass"]
    for column in ("gap", "molecules_per_cell"):
        table[column] = made[front + column]
    known = pd.DataFrame.from_dict(databases.core_mof_table(), orient="index").loc[names]
    table[list(GEOMETRY.values())] = known[list(GEOMETRY)].astype(float)
    return table


def statistics(part: pd.DataFrame) -> dict:
    """Errors of some crystals."""
    spread = part.label - part.label.mean()
    return {
        "n": len(part), "mae": part["size"].mean(), "median_error": part["size"].median(),
        "bias": part.error.mean(), "r2": 1 - (part.error**2).sum() / (spread**2).sum(),
        "spearman_of_spread_and_error": float(spearmanr(part.spread, part["size"]).statistic),
        "mean_label": part.label.mean(), "median_label_error": part.label_error.median(),
        "mean_label_error": part.label_error.mean(),
    }  # fmt: skip


def compositions(names: Sequence[str]) -> pd.DataFrame:
    """Reduced composition of crystals, as it is and with any metal called M."""
    app, metal = application(NAME), {z: Element.from_Z(z).is_metal for z in range(1, 103)}
    rows = []
    for name in tqdm(names, "compositions"):
        plain = Counter(app.crystal(name, symprec=0.0).species.tolist())
        exchanged: Counter = Counter()
        for z, n in plain.items():
            exchanged[0 if metal[z] else z] += n
        rows.append([tuple(sorted((z, n // math.gcd(*c.values())) for z, n in c.items()))
                     for c in (plain, exchanged)])  # fmt: skip
    return pd.DataFrame(rows, index=list(names), columns=["plain", "exchanged"])


def relatives(test: pd.DataFrame, train: Sequence[str]) -> dict:
    """How errors depend on relatives in the training set, and among the test crystals."""
    known = test.index.str[:6].isin({name[:6] for name in train})  # how the CSD names a structure
    here, there = compositions(test.index), compositions(train)
    out = {"n_compositions_in_test": here.plain.nunique(),
           "mae_each_composition_once": test["size"].groupby(here.plain).mean().mean()}  # fmt: skip
    found = {"same_six_letters": pd.Series(known, test.index)}
    for key, name in (("plain", "same_composition"), ("exchanged", "same_but_for_the_metal")):
        found[name] = here[key].isin(set(there[key]))
    for name, has in found.items():
        out[name] = {"n": int(has.sum()), "mae": test["size"][has].mean(),
                     "mae_of_others": test["size"][~has].mean()}  # fmt: skip
    return out


def protocols(rest: pd.DataFrame) -> dict:
    """What labels of longer chains (pass 1) exceed those of shorter ones (pass 0) by, in g/L.

    Which crystal is of which pass is random. Two estimates take out most of the variation between
    crystals: the networks' errors, on validation and test half together, and deviations from a
    straight line through the void fraction, on all crystals.
    """
    labels = application(NAME).labels()
    known = pd.DataFrame.from_dict(databases.core_mof_table(), orient="index").loc[labels.index]
    void = known.AV_VF.astype(float)
    line = labels.g_per_L - np.polyval(np.polyfit(void, labels.g_per_L, 1), void)
    out = {}
    for name, deviation, number in (("by_networks", -rest.error, rest["pass"]),
                                    ("by_void_fraction", line, labels["pass"])):  # fmt: skip
        of = [deviation[number == i] for i in (0, 1)]
        out[name] = {
            "n": [len(x) for x in of], "mean_deviation": [x.mean() for x in of],
            "difference": of[1].mean() - of[0].mean(),
            "error": np.sqrt(sum(x.var() / len(x) for x in of)),
        }  # fmt: skip
    return out


def errors() -> dict:
    """Content of errors.json."""
    app, table = application(NAME), predictions()
    parts = [table[table.half == half] for half in (0, 1)]
    test = parts[1]
    train = list(app.folds()[0].train)
    narrow, thirds = test.PLD_A < NITROGEN, pd.qcut(test.gap.abs(), 3, labels=False)
    mean = app.labels().g_per_L[train].mean()
    columns = ["label", "predicted", "spread", "error", "label_error", "gap",
               "molecules_per_cell", *GEOMETRY.values()]  # fmt: skip
    worst = test.nlargest(WORST, "size")
    return {
        "unit": app.unit, "members": 3, "fold": 0,
        **dict(zip(HALVES, map(statistics, parts), strict=True)),
        "always_the_mean": {"mean": mean, "test_mae": (test.label - mean).abs().mean()},
        "intervals": intervals(*parts),
        "pores": {"limit_A": NITROGEN, "closed": statistics(test[narrow]),
                  "open": statistics(test[~narrow])},
        "protocols": protocols(table), "mean_label": application(NAME).labels().g_per_L.mean(),
        "mae_by_thirds_of_gap": list(test["size"].groupby(thirds).mean()),
        "relatives": relatives(test, train),
        "worst": [{"name": name, **row} for name, row in worst[columns].to_dict("index").items()],
        "worst_closed": int(narrow[worst.index].sum()),
        "worst_too_high": int((worst.error > 0).sum()),
        "worst_least_error_in_label_errors": (worst["size"] / worst.label_error).min(),
    }  # fmt: skip


def simulated(name: str) -> dict:
    """A crystal simulated for longer, in g/L."""
    crystal, start = databases.core_mof(name), time.perf_counter()
    framework = Framework(crystal.lattice, crystal.species, crystal.frac_coords, None, name)
    [result] = gcmc([framework], LONGER)
    found = result.loadings["N2"]
    molecules = result.counts[:, result.discarded :, 0].mean(1) / result.n_cells
    return {
        "name": name, "g_per_L": found.g_per_L, "error": found.error_g_per_L,
        "molecules_per_cell": molecules.tolist(), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def longer(runs: Path) -> dict:
    """Content of longer.json."""
    table = predictions()
    test = table[table.half == 1]
    worst = test.nlargest(WORST, "size").index.tolist()
    drawn = np.random.default_rng(0).choice(sorted(test.index), WORST, replace=False).tolist()
    file = runs / NAME / "longer.jsonl"
    known = {row["name"]: row for row in shards.read_rows(file)}
    for name in tqdm([n for n in worst + drawn if n not in known]):
        known[name] = simulated(name)
        shards.append(file, [known[name]])
    took = sum(known[name]["seconds"] for name in {*worst, *drawn})
    out: dict = {"unit": "g/L", "settings": asdict(LONGER), "seconds_of_chains": took}
    for kind, names in (("worst", worst), ("random", drawn)):
        rows = [{**known[n], **test.loc[n, ["label", "label_error", "gap", "predicted"]]}
                for n in names]  # fmt: skip
        change = np.array([row["g_per_L"] - row["label"] for row in rows])
        error = np.abs([row["predicted"] - row["g_per_L"] for row in rows])
        out[kind] = {
            "n": len(rows), "mean_change": change.mean(), "mean_abs_change": np.abs(change).mean(),
            "max_abs_change": np.abs(change).max(), "n_higher": int((change > 0).sum()),
            "mae_against_longer": error.mean(),
            "mae_against_label": np.mean([abs(r["predicted"] - r["label"]) for r in rows]),
            "rows": rows,
        }  # fmt: skip
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--longer", action="store_true", help="simulate some crystals again")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of longer.jsonl")
    args = parser.parse_args()
    start, which = time.perf_counter(), "longer" if args.longer else "errors"
    payload = longer(args.runs) if args.longer else errors()
    results.write(
        f"{NAME}/{which}.json", payload, seed=LONGER.seed if args.longer else None,
        command="python tools/mof_n2_errors.py" + args.longer * " --longer",
        wall_s=time.perf_counter() - start,
    )  # fmt: skip
    print(json.dumps(results.plain(payload), indent=1))


if __name__ == "__main__":
    main()
