"""Where the models of mof-co2n2 err: by gas, by size of the uptake, and in the selectivity.

The mean over the seeds is compared with the labels, on both halves of the rest of fold 0. Intervals
of 90 % are fitted on the validation half and counted on the test half. The selectivity of CO2 over
N2, (x_CO2 / x_N2) / (y_CO2 / y_N2), is that of the two uptakes; crystals with less N2 than LEAST
have none, because their label is mostly noise, and a prediction below LEAST counts as LEAST. The
result is data/results/mof-co2n2/errors.json; it is made of the files that `x3mat train mof-co2n2`
wrote, in seconds.

With --charges the ten test crystals whose CO2 is predicted worst, and ten drawn at random from the
test half, are simulated again without any charges, in minutes: what they then take up shows how
much of the label is due to charges. The result is data/results/mof-co2n2/charges.json.

examples:
  python tools/mof_co2n2_errors.py
  python tools/mof_co2n2_errors.py --charges
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace

import mof_labels
import numpy as np
import pandas as pd
from intervals import intervals
from mof_n2_errors import HALVES, NITROGEN, WORST, predictions, statistics
from scipy.stats import spearmanr

from x3mat import databases, results
from x3mat.applications import application
from x3mat_gcmc import Framework, gcmc
from x3mat_gcmc.forcefield import guest

NAME, GASES = "mof-co2n2", ("CO2", "N2")
LEAST = 0.05  # g/L of N2; the median error of labels is about as large
TOP = 0.1  # share of the test crystals that a screening would keep
BARE = replace(mof_labels.PLANS[NAME].passes[0], charges="none", seed=2)


def tables_of_gases() -> dict[str, pd.DataFrame]:
    """`mof_n2_errors.predictions` of each gas."""
    fronts = mof_labels.fronts(GASES)
    return {gas: predictions(NAME, k, fronts[gas]) for k, gas in enumerate(GASES)}


def found(label: pd.Series, predicted: pd.Series) -> float:
    """Which share of the crystals with the greatest labels is among the greatest predictions."""
    n = round(TOP * len(label))
    return len(label.nlargest(n).index.intersection(predicted.nlargest(n).index)) / n


def selectivities(uptakes: pd.DataFrame) -> pd.Series:
    """Of CO2 over N2, from uptakes in g/L."""
    moles = [uptakes[gas].clip(lower=LEAST) / guest(gas)["molar_mass"] for gas in GASES]
    return moles[0] / moles[1] * BARE.fractions[1] / BARE.fractions[0]


def of_selectivities(label: pd.DataFrame, predicted: pd.DataFrame) -> dict:
    """How well selectivities are predicted, of crystals with enough N2; tables have the gases."""
    kept = label.index[label.N2 >= LEAST]
    label, predicted = (selectivities(table.loc[kept]) for table in (label, predicted))
    factor = np.exp(np.abs(np.log(predicted / label)))
    return {
        "least_n2": LEAST, "n": len(kept),
        "percentiles_5_50_95": np.percentile(label, [5, 50, 95]),
        "spearman": float(spearmanr(label, predicted).statistic),
        "median_factor": factor.median(), "n_within_factor_2": int((factor <= 2).sum()),
        "found_of_top_tenth": found(label, predicted),
    }  # fmt: skip


def errors() -> dict:
    """Content of errors.json."""
    app, tables = application(NAME), tables_of_gases()
    out: dict = {"unit": app.unit, "members": 3, "fold": 0, "gases": {}}
    for gas in GASES:
        parts = [tables[gas][tables[gas].half == half] for half in (0, 1)]
        test, narrow = parts[1], parts[1].PLD_A < NITROGEN
        mean = app.labels()[gas][list(app.folds()[0].train)].mean()
        worst = test.nlargest(WORST, "size").drop(columns="half")
        out["gases"][gas] = {
            **dict(zip(HALVES, map(statistics, parts), strict=True)),
            "always_the_mean": {"mean": mean, "test_mae": (test.label - mean).abs().mean()},
            "mae_by_quarters_of_label": list(
                test["size"].groupby(pd.qcut(test.label, 4, labels=False)).mean()),
            "found_of_top_tenth": found(test.label, test.predicted),
            "intervals": intervals(*parts),
            "pores": {"limit_A": NITROGEN, "closed": statistics(test[narrow]),
                      "open": statistics(test[~narrow])},
            "worst": [{"name": name, **row} for name, row in worst.to_dict("index").items()],
            "worst_closed": int(narrow[worst.index].sum()),
            "worst_too_high": int((worst.error > 0).sum()),
        }  # fmt: skip
    uptakes = (pd.DataFrame({gas: table[column][table.half == 1] for gas, table in tables.items()})
               for column in ("label", "predicted"))  # fmt: skip
    out["selectivity"] = of_selectivities(*uptakes)
    return out


def charges() -> dict:
    """Content of charges.json."""
    test = tables_of_gases()["CO2"].query("half == 1")
    chosen = {"worst": test.nlargest(WORST, "size").index.tolist(), "random": np.random.default_rng(
        0).choice(sorted(test.index), WORST, replace=False).tolist()}  # fmt: skip
    out: dict = {"unit": "g/L", "gas": "CO2", "settings": asdict(BARE)}
    for kind, names in chosen.items():
        crystals = [databases.core_mof(name, symprec=0.0) for name in names]
        frameworks = [Framework(c.lattice, c.species, c.frac_coords, None, c.name)
                      for c in crystals]  # fmt: skip
        loadings = [found.loadings["CO2"] for found in gcmc(frameworks, BARE, progress=True)]
        rows = [{"name": name, "label": test.label[name], "predicted": test.predicted[name],
                 "without_charges": x.g_per_L, "error": x.error_g_per_L}
                for name, x in zip(names, loadings, strict=True)]  # fmt: skip
        share = [row["without_charges"] / row["label"] for row in rows]
        out[kind] = {"n": len(rows), "median_share": np.median(share),
                     "greatest_share": max(share), "rows": rows}  # fmt: skip
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--charges", action="store_true", help="simulate some without charges")
    start, again = time.perf_counter(), parser.parse_args().charges
    payload = charges() if again else errors()
    results.write(f"{NAME}/{'charges' if again else 'errors'}.json", payload,
                  seed=BARE.seed if again else None, wall_s=time.perf_counter() - start,
                  command="python tools/mof_co2n2_errors.py" + again * " --charges")  # fmt: skip
    print(json.dumps(results.plain(payload), indent=1))


if __name__ == "__main__":
    main()
