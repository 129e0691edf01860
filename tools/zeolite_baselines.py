"""Baselines for the N2 uptake of zeolites; write data/results/zeolite-n2/baselines.json and .csv.

On the folds of data/zeolite-n2/folds.json: the mean of the training labels, ridge regression and
gradient boosting on density, void fraction and largest cavity. Hyper-parameters are chosen by the
mean absolute error on one half of a fold's rest, and the other half is then tested, so every
zeolite is tested once. Also what the labels' own errors add to any model's mean absolute error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product

import numpy as np
import pandas as pd
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from x3mat import results
from x3mat.applications import application
from x3mat.databases import iza
from x3mat.descriptors import describe

EXAMPLES = """examples:
  nice python tools/zeolite_baselines.py            # about a minute
  python tools/zeolite_baselines.py --seed 1 --output /tmp/baselines
"""
APPLICATION = application("zeolite-n2")
FEATURES = ("density", "void_fraction", "largest_cavity")
TARGET, ERROR = APPLICATION.columns[0], "error_g_L"
N_BOOTSTRAP = 2000
N_TREES = (25, 50, 100, 200, 400)


Candidate = tuple[dict[str, float], np.ndarray]


def mean(x: np.ndarray, y: np.ndarray, rest: np.ndarray, seed: int) -> list[Candidate]:
    """The mean of the training labels."""
    return [({}, np.full(len(rest), y.mean()))]


def ridge(x: np.ndarray, y: np.ndarray, rest: np.ndarray, seed: int) -> list[Candidate]:
    """Predictions of linear models of the standardised descriptors, one for each penalty."""
    options = [{"alpha": 10.0**power} for power in range(-3, 4)]
    fits = [make_pipeline(StandardScaler(), Ridge(**o)).fit(x, y) for o in options]
    return [(o, fit.predict(rest)) for o, fit in zip(options, fits, strict=True)]


def boosting(x: np.ndarray, y: np.ndarray, rest: np.ndarray, seed: int) -> list[Candidate]:
    """Predictions of gradient boosting, one for each setting and number of trees."""
    found = []
    for depth, leaf in product((1, 2, 3, 4), (3, 8)):
        options = {"max_depth": depth, "min_samples_leaf": leaf}
        model = GradientBoostingRegressor(
            learning_rate=0.05,
            subsample=0.7,
            n_estimators=max(N_TREES),
            random_state=seed,
            **options,
        ).fit(x, y)
        stages = list(model.staged_predict(rest))
        found += [({**options, "n_estimators": n}, stages[n - 1]) for n in N_TREES]
    return found


MODELS: dict[str, Callable[..., list[Candidate]]] = {
    "mean": mean,
    "ridge": ridge,
    "gradient boosting": boosting,
}


def scores(truth: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """Mean absolute error and coefficient of determination."""
    return {
        "mae": mean_absolute_error(truth, prediction),
        "r2": r2_score(truth, prediction),
        "n": len(truth),
    }


def bootstrap(truth: np.ndarray, prediction: np.ndarray, seed: int) -> list[float]:
    """95 % interval of the mean absolute error over resampled zeolites."""
    error = np.abs(truth - prediction)
    chosen = np.random.default_rng(seed).integers(len(error), size=(N_BOOTSTRAP, len(error)))
    return np.quantile(error[chosen].mean(axis=1), [0.025, 0.975]).tolist()


def label_error(truth: np.ndarray, sigma: np.ndarray) -> dict[str, float]:
    """What errors of the labels (standard errors sigma, normal) make of a perfect model."""
    relative = sigma / np.maximum(truth, 1e-12)
    return {
        "mean": sigma.mean(),
        "median": np.median(sigma),
        "max": sigma.max(),
        "median_relative": np.median(relative),
        "mae_of_a_perfect_model": np.sqrt(2 / np.pi) * sigma.mean(),
        "r2_of_a_perfect_model": 1 - (sigma**2).sum() / ((truth - truth.mean()) ** 2).sum(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of boosting and bootstrap (default 0)")
    parser.add_argument("--output", default="zeolite-n2/baselines", help="below data/results")
    arguments = parser.parse_args()
    start = time.perf_counter()
    table = APPLICATION.labels()
    features = pd.DataFrame(
        [asdict(describe(iza(code))) for code in tqdm(table.index, desc="descriptors")],
        index=table.index, columns=list(FEATURES),
    )  # fmt: skip
    folds = APPLICATION.folds()
    shown = pd.concat([table[[TARGET, ERROR]], features], axis=1)
    shown["fold"] = -1
    models = {}
    for name, model in MODELS.items():
        per_fold, chosen = [], []
        for k, fold in enumerate(tqdm(folds, desc=name)):
            train, rest = list(fold.train), list(fold.rest)
            x, y, unseen = features.loc[train], table.loc[train, TARGET], features.loc[rest]
            found = model(x.to_numpy(), y.to_numpy(), unseen.to_numpy(), arguments.seed)
            fits = pd.DataFrame({i: values for i, (_, values) in enumerate(found)}, index=rest)
            for test, validation in (fold.halves, fold.halves[::-1]):
                test, validation = list(test), list(validation)
                errors = fits.loc[validation].sub(table.loc[validation, TARGET], axis=0).abs()
                best = int(errors.mean().idxmin())
                chosen.append(found[best][0])
                shown.loc[test, name] = fits.loc[test, best]
                shown.loc[test, "fold"] = k
            per_fold.append(scores(shown.loc[rest, TARGET], shown.loc[rest, name]))
        tested = shown[shown["fold"] >= 0]
        truth, prediction = tested[TARGET].to_numpy(), tested[name].to_numpy()
        models[name] = {
            "test": scores(truth, prediction),
            "test_mae_interval_95": bootstrap(truth, prediction, arguments.seed),
            "per_fold": per_fold,
            "chosen": chosen,
        }
        test = models[name]["test"]
        print(f"{name}: MAE {test['mae']:.3f} g/L, R2 {test['r2']:.3f}")
    tested = shown[shown["fold"] >= 0]
    truth = tested[TARGET].to_numpy()
    path = results.write(
        f"{arguments.output}.json",
        {
            "unit": APPLICATION.unit,
            "conditions": APPLICATION.conditions,
            "features": FEATURES,
            "n": len(tested),
            "n_train": [len(fold.train) for fold in folds],
            "selection": "smallest mean absolute error on the other half of the fold's rest",
            "models": models,
            "label_error": label_error(truth, tested[ERROR].to_numpy()),
            "mae_of_the_median": np.abs(truth - np.median(truth)).mean(),
        },
        seed=arguments.seed,
        command=f"python tools/zeolite_baselines.py --seed {arguments.seed}",
        wall_s=time.perf_counter() - start,
    )
    shown.round(4).to_csv(path.with_suffix(".csv"), lineterminator="\n")


if __name__ == "__main__":
    main()
