"""Would networks of mof-co2n2 err less if they knew where in a crystal the gas is?

A label is one number for a crystal, and the network has to find out by itself which places make it.
But for a rigid framework with given charges, energies at all places are cheap, and a lattice gas
turns them into densities (x3mat_gcmc.lattice_gas). A window sees those around its centre.

--how first   The network first learns the densities that windows see, each window with a label of
              its own, then the crystals' labels as usual. It is X3Mat: nothing but atoms enters.
--how told    The network is told, of each window, the densities it sees, and how they are
              distributed over the crystal (logarithms of means and of quantiles), and corrects
              them: y = ρ exp(a) + b, with a and b = 0 to begin with. A prediction needs charges
              and energies of the crystal, too. Windows are drawn, and their mean is off by
              chance; the label that it is compared with is off by as much as the mean of their ρ.
gradient boosting (in the record, for comparison) learns the same correction of the mean density
              from the same distribution, without a network.

Steps; all but the first resume after a kill
    choose  errors of the lattice gas alone with several v and s, on training crystals: the record
            data/results/mof-co2n2/lattice_gas.json
    labels  densities at 384 places of each crystal, and means, into a folder; charges are predicted
            (x3mat_gcmc.charges)
    train   networks on the training set of fold 0, and their predictions of the rest
    table   the record data/results/mof-co2n2/places.json (or --name)
    ship    checkpoints of networks that are told, as data/models/mof-co2n2-told, and the errors of
            `x3mat predict` with them on the test half: data/results/mof-co2n2-told/summary.json

Errors are those of validation and test half; nothing is chosen by the latter. Energies were on a
grid of 0.4 Å at first; for the networks that are shipped, on that of the simulation, 0.25 Å.

examples:
  python tools/places.py choose --spacing 0.4
  python tools/places.py labels --spacing 0.4 --device cuda --jobs 30
  python tools/places.py train --how told --seeds 0 --device cuda
  python tools/places.py table --device cuda --jobs 3
  python tools/places.py labels --labels runs/places-fine --device cuda --jobs 12
  python tools/places.py table --how told --labels runs/places-fine --name told-64
  python tools/places.py table --how told --labels runs/places-fine --name told \\
      --set model.channels=32
  python tools/places.py ship --labels runs/places-fine --set model.channels=32
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import convergence
import gcmc_checks
import mof_co2n2_errors
import numpy as np
import pandas as pd
import summarize
import torch
import variants
from intervals import intervals, of_mean
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import Tensor
from tqdm import tqdm

from x3mat import paths, results, training
from x3mat.applications import application
from x3mat.errors import DataError, X3MatError
from x3mat.model import X3Mat, X3MatConfig, save_checkpoint
from x3mat.predict import Ensemble
from x3mat.sampling import windows_at
from x3mat.screening import digest, for_each, screen, side_by_side
from x3mat_gcmc import Framework
from x3mat_gcmc.charges import with_predicted_charges
from x3mat_gcmc.lattice_gas import (
    CONDITIONS,
    EXCLUDED,
    PLACES,
    QUANTILES,
    RANGE,
    SEEN,
    ToldX3Mat,
    densities,
    dilute,
    distribution,
    seen_at,
    told_of,
)

NAME = "mof-co2n2"
PART = 50  # crystals in a file of labels
VOLUMES, RANGES = (30.0, 45.0, 60.0, 75.0, 90.0), (0.9, 1.2, 1.5, 1.8, 2.1)  # Å3, Å
TRIED = 100  # training crystals on which they are chosen
LITTLE = 0.5, 8.0  # g/L of CO2
AGAINST = {"first": "usual", "told": "gradient boosting"}  # what a way is compared with
SETTINGS = gcmc_checks.SETTINGS["co2-n2"]
TOLD = len(SETTINGS.gases) * (2 + len(QUANTILES))  # numbers of each window, beside densities


# ------------------------------------------------------------------------------------ labels


def framework_of(name: str, charges: Mapping[str, np.ndarray]) -> Framework:
    """With its charges, which are predicted if they are not known."""
    crystal = application(NAME).crystal(name, symprec=0.0)
    if name not in charges:
        return with_predicted_charges(crystal)
    return Framework(crystal.lattice, crystal.species, crystal.frac_coords,
                     charges[name].astype(float), name)  # fmt: skip


def choose(args: argparse.Namespace) -> None:
    """The step `choose`."""
    began, app = time.perf_counter(), application(NAME)
    names = convergence.part(app.folds()[0].train, 0, args.limit or TRIED)
    label = app.labels().loc[names, list(app.columns)].to_numpy()
    pairs, means = list(product(VOLUMES, RANGES)), []
    for name in tqdm(names, unit="crystal"):
        framework = framework_of(name, {})
        zb = dilute(framework, replace(SETTINGS, spacing=args.spacing), args.device)
        means.append([[x.mean() for x in densities(framework.lattice, zb, SETTINGS.gases, *pair)]
                      for pair in pairs])  # fmt: skip
    error = np.abs(np.array(means) - label[:, None]).mean(0)
    rows = [{"volume_A3": v, "range_A": s, "mae": round(e.mean(), 3),
             "mae_of_each_output": e.round(3)}
            for (v, s), e in zip(pairs, error, strict=True)]  # fmt: skip
    results.write(
        f"{NAME}/lattice_gas.json",
        {"application": NAME, "unit": "g/L", "part": "training", "n": len(names), "rows": rows},
        seed=0, command=shlex.join(["python", "tools/places.py", *sys.argv[1:]]),
        wall_s=time.perf_counter() - began,
    )  # fmt: skip


def label_part(file: Path, names: Sequence[str], charges: Path | None, device: str,
               spacing: float = SETTINGS.spacing) -> None:  # fmt: skip
    """Means, and densities seen at the places, of some crystals, into a file."""
    torch.set_num_threads(1)
    rows, known = [], np.load(charges) if charges else {}
    for name in names:
        framework = framework_of(name, known)
        zb = dilute(framework, replace(SETTINGS, spacing=spacing), device)
        found = densities(framework.lattice, zb, SETTINGS.gases)
        seen = [seen_at(framework.lattice, density, PLACES) for density in found]
        rows.append(([x.mean() for x in found], seen))
    mean, seen = map(np.array, zip(*rows, strict=True))
    with results.replacing(file) as out:
        np.savez_compressed(out, name=names, mean=mean.astype(np.float32),
                            seen=seen.astype(np.float16))  # fmt: skip


def label_all(args: argparse.Namespace) -> None:
    """The step `labels`."""
    fold = application(NAME).folds()[0]
    names = [*fold.train, *fold.rest][: args.limit]
    args.labels.mkdir(parents=True, exist_ok=True)
    parts = [(args.labels / f"{k:04d}.npz", names[k : k + PART], args.charges, args.device,
              args.spacing) for k in range(0, len(names), PART)]  # fmt: skip
    side_by_side(label_part, [part for part in parts if not part[0].exists()], args.jobs)


def read_labels(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Means, (2,), and densities seen at the places, (2, places), by crystal, g/L."""
    mean, seen = {}, {}
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as found:
            names = found["name"].tolist()
            mean |= dict(zip(names, found["mean"], strict=True))
            seen |= dict(zip(names, found["seen"], strict=True))
    return mean, seen


# ---------------------------------------------------------------------------------- training


@dataclass(eq=False, repr=False)
class PlacedWindows(training.DrawnWindows):
    """Windows at some of the places of each crystal, in a row and so spread evenly, whose targets
    are the densities that they see."""

    mean: Sequence[np.ndarray] = ()  # density in each crystal, (outputs,)
    seen: Sequence[np.ndarray] = ()  # at its places, (outputs, places)

    def drawn(self, item: tuple[int, int]) -> tuple[training.Item, np.ndarray]:
        """Windows, and what they see, (outputs, W)."""
        epoch, i = item
        first = np.random.default_rng([self.seed, epoch, i]).integers(len(PLACES))
        chosen = (first + np.arange(self.windows_per_crystal)) % len(PLACES)
        crystal, pairs = self.known[i]
        windows = windows_at(
            crystal, PLACES[chosen], self.config.radius, self.config.step)
        share = np.full(len(chosen), 1 / len(chosen))
        return (training.Item(windows, pairs, share, self.targets[i]),
                self.seen[i][:, chosen].astype(float))

    def __getitem__(self, item: int | tuple[int, int]) -> training.Item:
        found, seen = self.drawn(item if isinstance(item, tuple) else (0, item))
        return found._replace(target=seen.T.ravel())


@dataclass(eq=False, repr=False)
class ToldWindows(PlacedWindows):
    """Likewise; beside the share of each window stand densities and what else is told of it."""

    spread: Sequence[np.ndarray] = ()  # of densities over each crystal, see distribution

    def __getitem__(self, item: int | tuple[int, int]) -> training.Item:
        epoch, i = item if isinstance(item, tuple) else (0, item)
        found, seen = self.drawn((epoch, i))
        told = told_of(self.spread[i], seen)
        return found._replace(share=np.column_stack([found.share, seen.T, told]),
                              target=found.target + seen.mean(1) - self.mean[i])  # fmt: skip


class TrainedX3Mat(ToldX3Mat):
    """Where the memory of a step is measured, nothing is told: zeros."""

    def readout(self, scalars: Tensor, told: Tensor | None) -> Tensor:
        if told is None:
            told = scalars.new_zeros(len(scalars), self.config.outputs + TOLD)
        return super().readout(scalars, told)


def windows_of(model: X3Mat, graph: training.WindowGraph, share: Tensor, crystal: Tensor,
               n: int, each: int) -> Tensor:  # fmt: skip
    """Contributions of `each` window of n crystals, one after the other, (n, each × outputs)."""
    return model.network(graph)[: n * each].reshape(n, -1)


def told_means(model: X3Mat, graph: training.WindowGraph, share: Tensor, crystal: Tensor,
               n: int) -> Tensor:  # fmt: skip
    """Mean contributions to n crystals, (n, outputs)."""
    y = model.network(replace(graph, told=share[:, 1:]))
    return y.new_zeros(n, y.shape[1]).index_add(0, crystal, y * share[:, :1])


def started(file: Path, config: X3MatConfig, kind: type[X3Mat] = X3Mat) -> X3Mat:
    """A network with the weights of a file."""
    model = kind(config)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def told_network(names: Sequence[str], mean: dict, seen: dict, config: X3MatConfig) -> X3Mat:
    """An untrained one that knows what is told of windows of these crystals."""
    told = np.concatenate([told_of(distribution(mean[n], seen[n]), seen[n].astype(float))
                           for n in names])  # fmt: skip
    model = TrainedX3Mat(config)
    model.standard.copy_(torch.as_tensor(np.array([told.mean(0), told.std(0)])))
    return model


def told_windows(found: training.DrawnWindows, mean: dict, seen: dict) -> ToldWindows:
    """Of the same crystals."""
    mean, seen = ([labels[n] for n in found.names] for labels in (mean, seen))
    return ToldWindows(**vars(found), mean=mean, seen=seen,
                       spread=list(map(distribution, mean, seen)))  # fmt: skip


@torch.no_grad()
def told_predictions(model: ToldX3Mat, data: ToldWindows) -> np.ndarray:
    """From windows around all places of each crystal, (n, outputs)."""
    data, found = replace(data, windows_per_crystal=len(PLACES)), []
    items = tqdm(for_each(data.__getitem__, range(len(data))), "predictions", len(data))
    for item, label in zip(items, data.targets, strict=True):
        batch = training.collate([item]).to(model.shift.device)
        y = told_means(model, batch.graph(), batch.share, batch.crystal, 1).cpu().numpy()[0]
        found.append(y - (item.target - label))  # by how much the mean over the places is off
    return np.array(found)


def one(stage: str, how: str, seed: int, args: argparse.Namespace) -> dict:
    """Train a stage, "first" or "then", keep the weights and what it took; or read it."""
    chosen, fold = application(NAME), application(NAME).folds()[0]
    epochs = {"first": args.first, "then": args.epochs}[stage]
    config = training.train_config(chosen, [*args.set, f"seed={seed}", f"epochs={epochs}"])
    begins = how == "first" and stage == "then"
    plan = [how, stage, begins and args.first, args.limit, args.labels.name, asdict(config)]
    folder = kept(args.runs, plan)
    if (folder / "found.json").exists():
        return {**json.loads((folder / "found.json").read_text()), "weights": folder / "model.pt"}
    mean, seen = read_labels(args.labels)
    names = [part[: args.limit] for part in (fold.train, *fold.halves)]

    def data(part: Sequence[str], learn: bool) -> training.DrawnWindows:
        found = training.crystals_of(chosen, part, config, learn)
        if begins:
            return found
        found = replace(found, windows_per_crystal=config.windows_per_crystal)
        if how == "told":
            return told_windows(found, mean, seen)
        return PlacedWindows(**vars(found), mean=[mean[n] for n in part],
                             seen=[seen[n] for n in part])  # fmt: skip

    network, function = X3Mat, None
    if begins:
        network = partial(started, one("first", how, seed, args)["weights"])
    elif how == "told":
        network, function = partial(told_network, names[0], mean, seen), told_means
    else:
        function = partial(windows_of, each=config.windows_per_crystal)
    with variants.predicting(function):
        result = training.train(
            config, data(names[0], True), data(names[1], False), folder, device=args.device,
            progress=args.jobs == 1, check_every=4, jobs=args.jobs, network=network)  # fmt: skip
    rest, found = [*names[1], *names[2]], {}
    if stage == "then":
        y = (told_predictions(result.model, data(rest, False)) if how == "told" else
             convergence.predicted([result.model], NAME, rest, config.model.step)[0][0])
        found = dict(zip(rest, y.tolist(), strict=True))
    torch.save({k: v.cpu() for k, v in result.model.state_dict().items()}, folder / "model.pt")
    about = {"plan": plan, "history": result.history, "seconds": result.wall_s,
             "predicted": found, "device": gcmc_checks.device_name(args.device)}  # fmt: skip
    (folder / "found.json").write_text(json.dumps(about))
    return {**about, "weights": folder / "model.pt"}


def kept(runs: Path, plan: list) -> Path:
    """Folder of a training's states."""
    return runs / "places" / hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]


def errors(predicted: dict[str, Sequence[float]], names: Sequence[str]) -> list[float]:
    """Mean absolute error of each gas, g/L."""
    app = application(NAME)
    label = app.labels().loc[list(names), list(app.columns)].to_numpy()
    return np.abs(np.array([predicted[name] for name in names]) - label).mean(0).tolist()


def train_all(args: argparse.Namespace) -> dict[tuple[str, int], dict]:
    """The step `train`: what :func:`one` found for each way and seed."""
    first = [("first", "first", seed, args) for seed in args.seeds if "first" in args.how]
    then = [("then", how, seed, args) for how in args.how for seed in args.seeds]
    side_by_side(one, first, args.jobs)
    found = dict(zip([job[1:3] for job in then], side_by_side(one, then, args.jobs), strict=True))
    check = application(NAME).folds()[0].halves[0][: args.limit]
    for (how, seed), run in found.items():
        print(f"{how}, seed {seed}: {np.mean(errors(run['predicted'], check)):.2f} g/L (validation)"
              f" after {run['seconds']:.0f} s")  # fmt: skip
    return found


# ----------------------------------------------------------------------------------- results


def boosted(names: Sequence[str], learn: Sequence[str], mean: dict, seen: dict) -> np.ndarray:
    """Mean densities and what they lack by gradient boosting, for three seeds, (3, n, outputs)."""
    app = application(NAME)
    x, x_new = (np.array([distribution(mean[n], seen[n]) for n in part]) for part in (learn, names))
    lacks = app.labels().loc[list(learn), list(app.columns)] - np.array([mean[n] for n in learn])
    y = np.array([[mean[n] for n in names]] * 3, float)
    for seed in range(3):
        for k, column in enumerate(lacks):
            trees = HistGradientBoostingRegressor(
                loss="absolute_error", max_iter=400, learning_rate=0.05, max_features=0.5,
                random_state=seed)  # fmt: skip
            y[seed, :, k] += trees.fit(x, lacks[column]).predict(x_new)
    return y


def usual(names: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Predictions of the application's networks, (seeds, n, outputs)."""
    runs = [results.read(f"{NAME}/runs/fold0-seed{seed}.json") for seed in seeds]
    found = [{p["name"]: p["predicted"] for p in run["predictions"]} for run in runs]
    return np.array([[each[name] for name in names] for each in found])


def scores(y: np.ndarray, label: np.ndarray, other: np.ndarray | None) -> dict:
    """Of predictions (seeds, n, outputs); beside those of another way, if there is one."""
    error, together = np.abs(y - label), y.mean(0) - label
    r2 = 1 - (together**2).sum(0) / ((label - label.mean(0)) ** 2).sum(0)
    found = {
        "mae": error.mean(), "interval": of_mean(error.mean((0, 2))),
        "mae_of_each_seed": error.mean((1, 2)), "mae_of_mean_over_seeds": np.abs(together).mean(),
        "mae_of_each_output": error.mean((0, 1)),
        "mae_of_mean_of_each_output": np.abs(together).mean(0), "r2_of_each_output": r2,
    }  # fmt: skip
    if other is not None:
        gain = (np.abs(other - label).mean(0) - error.mean(0)).mean(1)
        found |= {"gain": gain.mean(), "gain_interval": of_mean(gain)}
    return {key: np.round(value, 4).tolist() for key, value in found.items()}


def cost(names: Sequence[str]) -> dict:
    """Seconds for charges and densities of some crystals on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        label_part(Path(folder, "compiled.npz"), names[:1], None, "cpu")
        began = time.perf_counter()
        label_part(Path(folder, "timed.npz"), names, None, "cpu")
    torch.set_num_threads(threads)
    return {"crystals": len(names), "seconds": round(time.perf_counter() - began, 1)}


def dilute_limit(mean: dict[str, np.ndarray]) -> dict:
    """Quartiles of the lattice gas over the label, for each gas, where there is little."""
    label = application(NAME).labels().loc[list(mean), list(application(NAME).columns)].to_numpy()
    little = (label[:, 0] > LITTLE[0]) & (label[:, 0] < LITTLE[1])
    ratio = np.array(list(mean.values()))[little] / label[little]
    return {"co2_g_per_L": LITTLE, "n": int(little.sum()),
            "ratio_quartiles": np.quantile(ratio, [0.25, 0.5, 0.75], axis=0).T.round(4).tolist()}


def table(args: argparse.Namespace) -> None:
    """The step `table`."""
    began, app, fold = time.perf_counter(), application(NAME), application(NAME).folds()[0]
    halves = dict(zip(("validation", "test"), (h[: args.limit] for h in fold.halves), strict=True))
    made, (mean, seen) = train_all(args), read_labels(args.labels)
    rest, learn = [*halves["validation"], *halves["test"]], fold.train[: args.limit]
    ways = {"usual": usual(rest, args.seeds),
            "lattice gas": np.array([[mean[name] for name in rest]], float),
            "gradient boosting": boosted(rest, learn, mean, seen)}  # fmt: skip
    for how in args.how:
        every = [made[how, seed]["predicted"] for seed in args.seeds]
        ways[how] = np.array([[each[name] for name in rest] for each in every])
    label = app.labels().loc[rest, list(app.columns)].to_numpy()
    rows = []
    for how, y in ways.items():
        row = {"how": how}
        if how in args.how:
            runs = [made[how, seed] for seed in args.seeds]
            row["seconds"] = [round(run["seconds"], 1) for run in runs]
            row["train_mae"] = [round(run["history"][-1]["train_mae"], 3) for run in runs]
        for half, names in halves.items():
            at = slice(0, len(names)) if half == "validation" else slice(-len(names), None)
            other = AGAINST.get(how)
            row[half] = scores(y[:, at], label[at], ways[other][:, at] if other else None)
        rows.append(row)
    tables = {how: pd.DataFrame(y.mean(0)[-len(halves["test"]) :], halves["test"], app.columns)
              for how, y in {"label": label[None], **ways}.items()}  # fmt: skip
    choosing = {how: {**mof_co2n2_errors.of_selectivities(tables["label"], tables[how]),
                      "found_of_top_co2": mof_co2n2_errors.found(
                          tables["label"].CO2, tables[how].CO2)}
                for how in ways}  # fmt: skip
    results.write(
        f"{NAME}/{args.name}.json",
        {"application": NAME, "unit": "g/L", "outputs": list(app.columns), "places": len(PLACES),
         "n": {half: len(names) for half, names in halves.items()}, "n_train": len(learn),
         "volume_A3": EXCLUDED, "range_A": RANGE, "seen_A": SEEN, "first_epochs": args.first,
         "epochs": args.epochs, "set": args.set, "jobs": args.jobs, "device": runs[0]["device"],
         "against": AGAINST, "dilute": dilute_limit(mean), "cost": cost(halves["test"][:20]),
         "rows": rows, "selectivity": choosing,
         "told": [[round(y[0], 1), round(y[1], 3)] for y in  # in the order of the test half
                  (tables["told"].to_numpy().tolist() if "told" in tables else [])]},
        seed=args.seeds, command=shlex.join(["python", "tools/places.py", *sys.argv[1:]]),
        wall_s=time.perf_counter() - began,
    )  # fmt: skip


def ship(args: argparse.Namespace) -> None:
    """The step `ship`."""
    app, fold, name = application(NAME), application(NAME).folds()[0], f"{NAME}-told"
    train, check, test = (part[: args.limit] for part in (fold.train, *fold.halves))
    conditions = {key: getattr(SETTINGS, key) for key in CONDITIONS}
    folder = args.out / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    runs, models = [one("then", "told", seed, args) for seed in args.seeds], []
    for seed, run in zip(args.seeds, runs, strict=True):
        config = training.train_config(
            app, [*args.set, f"seed={seed}", f"epochs={args.epochs}"])  # fmt: skip
        about = training.description(app, 0, config, train)
        about["lattice_gas"] = results.plain(conditions)
        model = started(run["weights"], config.model, ToldX3Mat)
        models.append(save_checkpoint(folder / f"fold0-seed{seed}.pt", model, about))
    ensemble = Ensemble(name, tuple(model.to(args.device) for model in models), (about,))
    table = screen(test, ensemble, args.runs / f"told-{digest(ensemble)}", read=app.crystal,
                   progress=True).set_index("file")  # fmt: skip
    if bad := sorted(set(table.error) - {""}):
        raise DataError(name, f"test crystals cannot be predicted ({bad[0]})",
                        f"see the column error of the table in {args.runs}")
    n, label = len(app.columns), app.labels().loc[list(test), list(app.columns)]
    rows = pd.concat([pd.DataFrame({
        "name": test, "seed": seed, "output": column, "label": label[column].to_numpy(),
        "predicted": table.loc[list(test), f"y{k * n + j}"].to_numpy()})
        for k, seed in enumerate(args.seeds) for j, column in enumerate(app.columns)])  # fmt: skip
    found, shown, each = zip(*(summarize.scores_of(part) for _, part in
                               rows.groupby("output", sort=False)), strict=True)  # fmt: skip
    folder = args.out / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    pd.concat(shown).round(4).to_csv(folder / "predictions.csv")
    every = np.array([[run["predicted"][name] for name in check] for run in runs])
    truth = app.labels().loc[list(check), list(app.columns)].to_numpy()
    fit = [pd.DataFrame({"size": np.abs(every[..., j].mean(0) - truth[:, j]),
                         "spread": every[..., j].std(0, ddof=1)}) for j in range(n)]  # fmt: skip
    widths = {column: intervals(fit[j], part.assign(size=(part.predicted - part.label).abs()))
              for j, (column, part) in enumerate(zip(app.columns, shown, strict=True))
              if len(test) > 2}  # which are thirds  # fmt: skip
    places = [np.mean(errors(run["predicted"], part)) for part in (check, test) for run in runs]
    results.write(
        (folder / "summary.json").absolute(),
        {"application": NAME, "property": app.property, "conditions": app.conditions,
         "unit": app.unit, **summarize.of_outputs(app.columns, found, each),
         "n_train": [len(train)], "n_test": len(test), "seeds": args.seeds,
         "config": asdict(config),
         "lattice_gas": conditions, "training_hardware": runs[0]["device"],
         "training_wall_s": sum(run["seconds"] for run in runs),
         "around_places": {"validation_mae": np.mean(places[: len(runs)]),
                           "test_mae": np.mean(places[len(runs) :])},
         "intervals": widths, "weights": digest(ensemble)},
        seed=args.seeds, command=shlex.join(["python", "tools/places.py", *sys.argv[1:]]),
        wall_s=sum(run["seconds"] for run in runs),
    )  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = {"choose": choose, "labels": label_all, "train": train_all, "table": table,
             "ship": ship}  # fmt: skip
    parser.add_argument("step", choices=steps)
    parser.add_argument("--how", nargs="+", default=["first", "told"],
                        choices=["first", "told"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--first", type=int, default=24, help="epochs of densities")
    parser.add_argument("--epochs", type=int, default=24, help="epochs of labels")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                        help="hyper-parameters, as of x3mat train")  # fmt: skip
    parser.add_argument("--limit", type=int, help="of crystals in each part (tries)")
    parser.add_argument("--charges", type=Path, help="file of given_charges.py with the charges")
    parser.add_argument("--labels", type=Path, default=Path("runs/places-labels"),
                        help="folder of the labels of windows")  # fmt: skip
    parser.add_argument("--spacing", type=float, default=SETTINGS.spacing,
                        help="of the grids of energies, Å")  # fmt: skip
    parser.add_argument("--out", type=Path, default=paths.data(),
                        help="folder for what is shipped")  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--name", default="places", help="of the record")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of states")
    args = parser.parse_args()
    try:
        steps[args.step](args)
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
