"""How an application's error depends on training crystals, windows, degrees and the network.

sizes   networks trained on random parts of the training set of fold 0, nested for each seed, with
        the application's hyper-parameters. A part is seen `epochs` times, but no training has
        fewer than LEAST_STEPS steps. Errors are of the whole test half; nothing is chosen by them.
radii   networks with windows of several radii, trained briefly on a part of the training set, one
        for each seed. Errors are of the validation half.
degrees the same with one radius and several largest degrees l_max of the features (m_max up to the
        application's): what do vectors and tensors buy?
windows the same with several numbers of windows of a crystal in each step. Their mean stands for
        that of all windows in the loss: how far it scatters, and by how much |mean − label| is
        larger, is measured on the validation half.
variants
        the same with other networks, see tools/variants.py: what does attention buy?
steps   the application's trained networks of fold 0, with windows on finer and coarser grids.
        Errors are of the validation half. No network is trained: windows of training are drawn
        from all places.

All windows of the grid are averaged. Trainings run side by side, resume after a kill, and what is
finished is kept in the folder of runs. The result is data/results/APPLICATION/WHAT.json (or NAME).

examples:
  python tools/convergence.py mof-n2 sizes --device cuda --jobs 4
  python tools/convergence.py mof-n2 radii --seeds 0 1 --device cuda --jobs 4
  python tools/convergence.py mof-n2 degrees --device cuda --jobs 4
  python tools/convergence.py qmof-gap variants --values usual uniform se3 window --device cuda
  python tools/convergence.py mof-n2 steps
  python tools/convergence.py zeolite-n2 radii --seeds 0 1 --jobs 2 --brief 1000 25 \\
      --set copies=0 windows_per_crystal=8 model.l_max=1 model.m_max=1 model.channels=16
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import variants
from tqdm import tqdm

from x3mat import results
from x3mat.applications import application
from x3mat.model import X3Mat, X3MatConfig
from x3mat.predict import load_model
from x3mat.sampling import Windows, sample_windows
from x3mat.screening import evaluate, for_each, side_by_side
from x3mat.training import (
    TrainConfig,
    collate,
    crystals_of,
    predict_mean,
    train,
    train_config,
)

USUAL = {  # values: crystals, Å, Å, l_max, windows, names
    "sizes": (100, 300, 1000, 2000), "radii": (3.0, 4.0, 5.0, 6.0, 8.0, 10.0),
    "steps": (1.0, 1.5, 2.0, 3.0, 4.0), "degrees": (0, 1, 2, 3, 4), "windows": (1, 2, 4, 8, 16),
    "variants": ("usual", "uniform", "se3"),
}  # fmt: skip
LEAST_STEPS = 1500  # of a training on few crystals
BRIEF = 1000, 20  # crystals and epochs of the trainings for all but sizes
DRAWS = 4  # of windows of each crystal, whose means are compared with those of all windows
COSTS = "seconds", "peak_gib", "epochs"  # what is kept of a training


def part(names: Sequence[str], seed: int, n: int) -> list[str]:
    """n of the names at random; a larger part holds the smaller ones."""
    return np.random.default_rng(seed).permutation(sorted(names))[:n].tolist()


def changes(what: str, name: str, value: float | str) -> list[str]:
    """The hyper-parameters that a value stands for."""
    if what == "degrees":
        m_max = min(int(value), train_config(application(name)).model.m_max)
        return [f"model.l_max={int(value)}", f"model.m_max={m_max}"]
    if what == "windows":
        return [f"windows_per_crystal={int(value)}"]
    if what == "variants":
        return [f"model.encoding={value}"] * (value in ("window", "crystal"))
    return [f"model.radius={value}"]


def plan(what: str, name: str, values: Sequence[float | str], seeds: Sequence[int],
         brief: tuple[int, int], given: Sequence[str] = ()) -> list[tuple]:  # fmt: skip
    """(value, seed, number of crystals, hyper-parameters) of each training."""
    chosen, out = application(name), []
    for value in values:
        for seed in seeds:
            if what == "sizes":
                config = train_config(chosen, [*given, f"seed={seed}"])
                shorter = -(-LEAST_STEPS * config.crystals_per_step // int(value))
                config = train_config(
                    chosen, [*given, f"seed={seed}", f"epochs={max(config.epochs, shorter)}"]
                )
                out.append((value, seed, int(value), config))
            else:
                usual = [*given, f"seed={seed}", f"epochs={brief[1]}"]
                config = train_config(chosen, [*usual, *changes(what, name, value)])
                out.append((value, seed, brief[0], config))
    return out


def trained(
    name: str, folder: Path, variant: str, n: int, config: TrainConfig, device: str
) -> dict:
    """Train on n crystals and keep the network; or read what is there."""
    file, chosen = folder / "model.pt", application(name)
    if not file.exists():
        split = chosen.folds()[0]
        learn = part(split.train, config.seed, n)
        check = part(split.halves[0], 0, min(n, 100))
        data = [crystals_of(chosen, names, config, training=i == 0)
                for i, names in enumerate((learn, check))]  # fmt: skip
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        network = partial(variants.network, variant)
        result = train(config, *data, folder, device=device, progress=False,
                       check_every=config.epochs, network=network)  # fmt: skip
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
        state = {"config": asdict(config.model), "state": result.model.cpu().state_dict()}
        costs = {"seconds": result.wall_s, "peak_gib": peak, "epochs": config.epochs}
        torch.save({**state, "variant": variant, "costs": costs}, file)
    return torch.load(file, weights_only=True)["costs"]


def read(file: Path, device: str) -> X3Mat:
    """What :func:`trained` kept."""
    kept = torch.load(file, weights_only=True)
    model = variants.network(kept["variant"], X3MatConfig(**kept["config"]))
    model.load_state_dict(kept["state"])
    return model.to(device).eval()


def _cut(name: str, radius: float, step: float, crystal: str) -> tuple[int, Windows]:
    windows = sample_windows(application(name).crystal(crystal), radius, step)
    return windows.n_windows, replace(windows, positions=windows.positions.astype(np.float32))


def predicted(models: Sequence[X3Mat], name: str, crystals: Sequence[str], step: float):
    """Means over all windows of the grid, (models, crystals, outputs), and windows in all."""
    radius = models[0].config.radius
    cuts = for_each(partial(_cut, name, radius, step), crystals)
    with torch.no_grad():
        found = list(tqdm(evaluate(models, cuts), f"R = {radius:g} Å, step {step:g} Å",
                          len(crystals)))  # fmt: skip
    return np.stack([y for _, y in found], 1), sum(n for n, _ in found)


@torch.no_grad()
def drawn(models: Sequence[X3Mat], name: str, crystals: Sequence[str], config: TrainConfig):
    """Means over windows drawn as in training, (draws, models, crystals, outputs)."""
    config = replace(config, noise=0.0, copies=0)
    data = crystals_of(application(name), crystals, config, training=True)
    device, found = models[0].shift.device, []
    for draw in tqdm(range(DRAWS), f"{config.windows_per_crystal} windows"):
        parts = []
        for first in range(0, len(data), 8):
            items = [data[draw, i] for i in range(first, min(first + 8, len(data)))]
            batch = collate(items).to(device)
            parts.append(torch.stack([predict_mean(m, batch, 10**5) for m in models]))
        found.append(torch.cat(parts, 1).cpu().numpy())
    return np.stack(found)


def kept(runs: Path, name: str, variant: str, n: int, config: TrainConfig) -> Path:
    """Folder of a training's states. What is trained for one question need not be for another."""
    text = json.dumps([variant, n, asdict(config)])
    return runs / "convergence" / name / hashlib.sha256(text.encode()).hexdigest()[:16]


def train_all(args: argparse.Namespace, jobs: Sequence[tuple]) -> tuple[list[Path], list[dict]]:
    """Files of all networks, and what each training took."""
    jobs = [(v if v in ("uniform", "se3") else "usual", *job) for v, _, *job in jobs]
    folders = [kept(args.runs, args.application, *job) for job in jobs]
    runs = [(args.application, folder, *job, args.device)
            for folder, job in zip(folders, jobs, strict=True)]  # fmt: skip
    costs = side_by_side(trained, runs, args.jobs)
    return [folder / "model.pt" for folder in folders], costs


def rows_of_trainings(args: argparse.Namespace, names: Sequence[str]) -> list[dict]:
    """For each value the means that its networks, one of each seed, predict, and their costs."""
    jobs = plan(args.what, args.application, args.values, args.seeds, tuple(args.brief), args.set)
    files, costs = train_all(args, jobs)
    rows = []  # networks of one radius read the same windows
    for group in [args.values] if args.what == "sizes" else [[v] for v in args.values]:
        here = [i for i, job in enumerate(jobs) if job[0] in group]
        models = [read(files[i], args.device) for i in here]
        found, windows = predicted(models, args.application, names, models[0].config.step)
        more = {}
        if args.what in ("degrees", "variants"):
            more["parameters"] = sum(p.numel() for p in models[0].parameters())
        if args.what == "windows":
            more["drawn"] = drawn(models, args.application, names, jobs[here[0]][3])
        for value in group:
            mine = [j for j, i in enumerate(here) if jobs[i][0] == value]
            rows.append({"value": value, "windows": windows, "found": found[mine],
                         "n_train": jobs[here[mine[0]]][2], **more,
                         **{k: [costs[here[j]][k] for j in mine] for k in COSTS}})  # fmt: skip
    return rows


def rows_of_steps(args: argparse.Namespace, names: Sequence[str]) -> list[dict]:
    """For each spacing of the grid the means that the shipped networks of fold 0 predict."""
    columns = application(args.application).columns
    output = f":{columns[0]}" * (len(columns) > 1)  # all are read, whichever is named
    shipped, rows = load_model(args.application + output, args.device), []
    models = [m for m, about in zip(shipped.members, shipped.about, strict=True)
              if about["fold"] == 0]  # fmt: skip
    for step in args.values:
        begun = time.perf_counter()
        found, windows = predicted(models, args.application, names, step)
        change = np.abs(found - rows[0]["found"]).mean() if rows else 0.0
        rows.append({"value": step, "predicted_s": time.perf_counter() - begun, "found": found,
                     "windows": windows, "mean_change_from_first": change})  # fmt: skip
    return rows


def with_errors(rows: Sequence[dict], labels: np.ndarray) -> list[dict]:
    """Rows with errors in the place of what was found, (models, crystals, outputs), and drawn."""
    out = []
    for row in rows:
        found, each = row["found"], np.abs(row["found"] - labels).mean((1, 2))
        out.append({**{k: v for k, v in row.items() if k not in ("found", "drawn")},
                    "mae_of_each_seed": each, "mae": each.mean(),
                    "mae_of_mean_over_seeds": np.abs(found.mean(0) - labels).mean()})  # fmt: skip
        if "drawn" in row:
            scatter = np.sqrt(np.square(row["drawn"] - found).mean((0, 2, 3)))
            out[-1] |= {"mae_of_drawn": np.abs(row["drawn"] - labels).mean(),
                        "median_scatter": np.median(np.abs(row["drawn"] - found)),
                        "rms_scatter": scatter.mean()}  # fmt: skip
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("application", help="as x3mat data list names it")
    parser.add_argument("what", choices=list(USUAL))
    parser.add_argument("--values", nargs="+", help="instead of the usual ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--brief", type=int, nargs=2, default=BRIEF,
                        help="crystals and epochs for all but sizes")  # fmt: skip
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                        help="hyper-parameters of the trainings, as for x3mat train")  # fmt: skip
    parser.add_argument("--limit", type=int, help="of the crystals that are predicted")
    parser.add_argument("--name", help="of the result, if another than that of the question")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of states")
    args = parser.parse_args()
    start, chosen = time.perf_counter(), application(args.application)
    args.values = list(args.values or USUAL[args.what])
    if args.what != "variants":
        args.values = [float(value) for value in args.values]
    elif unknown := set(args.values) - set(variants.NAMES):
        parser.error(f"{sorted(unknown)}: choose from {', '.join(variants.NAMES)}")
    half = int(args.what == "sizes")
    names = chosen.folds()[0].halves[half][: args.limit]
    labels = chosen.labels().loc[list(names), list(chosen.columns)].to_numpy(float)
    rows = (rows_of_steps if args.what == "steps" else rows_of_trainings)(args, names)
    rows = with_errors(rows, labels)
    results.write(
        f"{args.application}/{args.name or args.what}.json",
        {"application": args.application, "unit": chosen.unit, "jobs": args.jobs,
         "half": ["validation", "test"][half], "n": len(names), "device": args.device,
         "seeds": args.seeds if args.what != "steps" else None, "rows": rows},
        seed=args.seeds, command=" ".join(["python tools/convergence.py", *sys.argv[1:]]),
        wall_s=time.perf_counter() - start,
    )  # fmt: skip
    for row in rows:
        print(f"{row['value']}: {row['mae']:.4f} {chosen.unit}")


if __name__ == "__main__":
    main()
