"""Ideas that might lower the error of qmof-gap, each tried briefly.

dropout   a tenth of the channels of each atom and probe is set to zero before each block, for the
          residual connection and all that follows, too; the others are larger by as much
head      a fifth of the channels of the probes is set to zero before the last two layers
decay     AdamW's weight decay is 0.3
pairs     a tenth of the pairs of atoms is left out of each crystal in each step; predictions have
          all of them
masked    a tenth of the atoms lose their element in each step: they have that of the probes, 0
weighted  the prediction is a learned mean of the windows, Σ m exp(a) y / Σ m exp(a), not the plain
          one: a second output of the network gives a
charges   training starts from a network that has learned the DDEC6 charges of all training
          crystals, with windows centred at atoms; charges-decay and charges-dropout combine it with
          the above, charges-slow with half of the learning rate

All else is as in the rows `usual` of tools/convergence.py qmof-gap variants: the same crystals and
seeds, and errors of the same part of the validation half. The test set is not touched. Trainings
run side by side, all but that of charges resume after a kill, and what is finished is kept in the
folder of runs. Needs X3MAT_DATA. The result is data/results/qmof-gap/trials.json (or --name).

examples:
  python tools/trials.py --device cuda --jobs 4
  python tools/trials.py --ideas weighted --seeds 0 --brief 40 2 --limit 8 --name try
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import convergence
import numpy as np
import torch
import variants
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from x3mat import paths, results, training
from x3mat.applications import application
from x3mat.model import X3Mat, X3MatConfig, contributions
from x3mat.sampling import windows_at
from x3mat.screening import for_each, processes, side_by_side

NAME = "qmof-gap"
CENTRED = 8  # windows at atoms of each crystal and step
IDEAS = {
    "dropout": {"network": {"channels": 0.1}},
    "head": {"network": {"last": 0.2}},
    "decay": {"changes": ["weight_decay=0.3"]},
    "pairs": {"data": {"left_out": 0.1}},
    "masked": {"data": {"masked": 0.1}},
    "weighted": {"network": {"weighted": True}},
    "charges": {"start": True},
    "charges-dropout": {"start": True, "network": {"channels": 0.1}},
    "charges-decay": {"start": True, "changes": ["weight_decay=0.3"]},
    "charges-slow": {"start": True, "changes": ["learning_rate=1e-3"]},
}


class Dropped(nn.Module):
    """A block that a share of the channels of each node does not reach in training."""

    def __init__(self, block: nn.Module, share: float):
        super().__init__()
        self.block, self.share = block, share

    def forward(self, x: Tensor, *rest) -> Tensor:
        keep = nn.functional.dropout(torch.ones_like(x[:, :1]), self.share, self.training)
        return self.block(x * keep, *rest)


class TrialX3Mat(X3Mat):
    """X3Mat with dropout of channels or of the ``last`` features, or a second, learned weight of
    each window; by the plain layers on all devices where there is dropout between blocks."""

    def __init__(self, config: X3MatConfig, start: Path | None = None, channels: float = 0.0,
                 last: float = 0.0, weighted: bool = False):  # fmt: skip
        super().__init__(config)
        self.channels, self.last = channels, last
        self.gate = nn.Linear(config.channels, 1) if weighted else None
        if weighted:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        if start:  # all but what reads out the charge
            own = ("head.", "norm.", "shift", "scale", "degree")
            learned = {k: v for k, v in torch.load(start, weights_only=True).items()
                       if not k.startswith(own) or k.startswith("degree_embedding")}
            if self.load_state_dict(learned, strict=False).unexpected_keys:
                raise ValueError(f"{start} is of another network")
        if channels:
            self.blocks = nn.ModuleList(Dropped(block, channels) for block in self.blocks)

    def _kernels(self, positions: Tensor):
        return None if self.channels else super()._kernels(positions)

    def readout(self, scalars: Tensor, told: Tensor | None) -> Tensor:
        last = nn.functional.dropout(self.norm(scalars), self.last, self.training)
        y = self.shift + self.scale * self.head(last)
        return y if self.gate is None else torch.cat([y, self.gate(last)], dim=1)


def weighted_means(model: X3Mat, graph: training.WindowGraph, share: Tensor, crystal: Tensor,
                   n: int) -> Tensor:  # fmt: skip
    """:func:`weighted_mean` of what a network says of a graph."""
    return weighted_mean(model.network(graph), share, crystal, n)


def weighted_mean(y: Tensor, share: Tensor, crystal: Tensor, n: int) -> Tensor:
    """Σ m exp(a) y / Σ m exp(a) over the windows of each of n crystals, from (W, 2)."""
    weight = share[:, None] * torch.exp(y[:, 1:].clamp(-8, 8))
    sums = [y.new_zeros(n, 1).index_add(0, crystal, x) for x in (weight * y[:, :1], weight)]
    return sums[0] / (sums[1] + 1e-9)


@dataclass(eq=False, repr=False)
class AlteredWindows(training.DrawnWindows):
    """Drawn windows, of shared atoms, without a share of the pairs or of the elements."""

    left_out: float = 0.0
    masked: float = 0.0

    def __getitem__(self, item: int | tuple[int, int]) -> training.Item:
        found, key = super().__getitem__(item), item if isinstance(item, tuple) else (0, item)
        rng, pairs = np.random.default_rng([7, self.seed, *key]), found.pairs
        crystal = found.windows.crystal
        keep = rng.random(len(pairs.src)) >= self.left_out
        pairs = training.Pairs(np.array([0, keep.sum()]), pairs.src[keep], pairs.dst[keep],
                               pairs.vector[keep])
        unknown = rng.random(crystal.n_atoms) < self.masked
        crystal = replace(crystal, species=np.where(unknown, 0, crystal.species))
        windows = replace(found.windows, crystal=crystal)
        return found._replace(windows=windows, pairs=pairs)


class Charges(Dataset):
    """Windows centred at some atoms of each crystal, and the charges of these, e."""

    def __init__(self, names: list[str], config: X3MatConfig, seed: int):
        with np.load(paths.external() / "qmof.npz") as file:
            ids, ptr, charges = (file[key] for key in ("id", "ptr", "charge_ddec6_e"))
        row = {name: i for i, name in enumerate(ids.tolist())}
        each = {n: charges[ptr[row[n]] : ptr[row[n] + 1]].astype(np.float32) for n in names}
        self.names = [name for name in names if np.isfinite(each[name]).all()]
        self.charges = [each[name] for name in self.names]
        self.known = list(for_each(partial(_read, config.cutoff), self.names))
        self.config, self.seed = config, seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: tuple[int, int]) -> tuple[training.Item, np.ndarray]:
        (crystal, pairs), charges = self.known[item[1]], self.charges[item[1]]
        rng = np.random.default_rng([self.seed, *item])
        at = rng.choice(crystal.n_atoms, CENTRED, replace=crystal.n_atoms < CENTRED)
        windows = windows_at(
            crystal, crystal.frac_coords[at], self.config.radius, self.config.step)
        share = np.full(CENTRED, 1 / CENTRED)
        return training.Item(windows, pairs, share, np.zeros(1)), charges[at]


def _read(cutoff: float, name: str) -> tuple:
    crystal = application(NAME).crystal(name, symprec=0.0)
    return crystal, training.crystal_pairs(crystal, cutoff)


def joined(items: list) -> tuple[training.PackedBatch, Tensor]:
    """A batch, and the charges at the centres of its windows."""
    parts, charges = zip(*items, strict=True)
    return (training.PackedBatch.of(training.collate(parts)),
            torch.as_tensor(np.concatenate(charges)))


@dataclass(frozen=True)
class Order:
    """Batches of (epoch, crystal)."""

    n: int
    size: int
    epochs: int
    seed: int

    def __len__(self) -> int:
        return self.epochs * (self.n // self.size)

    def __iter__(self) -> Iterator[list]:
        for epoch in range(self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            for k in range(0, self.n - self.size + 1, self.size):
                yield [(epoch, int(i)) for i in order[k : k + self.size]]


def learn_charges(file: Path, device: str, epochs: int, limit: int | None) -> None:
    """Train on charges, keep the weights in ``file``, and the errors beside it."""
    if file.exists():
        return
    config, fold = training.train_config(application(NAME)), application(NAME).folds()[0]
    learn, check = (Charges(list(names), config.model, seed) for names, seed in (
        (fold.train[:limit], 0), (fold.halves[0][: min(limit or 400, 400)], 10**6)))  # fmt: skip
    torch.manual_seed(0)
    model, seen = X3Mat(config.model), np.concatenate(learn.charges)
    with torch.no_grad():
        degrees = [model.mean_degree(training.collate([learn[0, i][0]]).graph())
                   for i in range(min(300, len(learn)))]  # fmt: skip
        model.degree.copy_(torch.stack(degrees).mean(0))
        model.shift.fill_(float(seen.mean()))
        model.scale.fill_(float(seen.std()))
    model.to(device)
    order = Order(len(learn), min(config.crystals_per_step, len(learn)), epochs, 0)
    options = processes(len(learn)) if device == "cuda" else {}
    loader = DataLoader(learn, batch_sampler=order, collate_fn=joined,
                        pin_memory=device == "cuda", **options)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, betas=(0.9, 0.98),
                                  weight_decay=config.weight_decay)  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, max(len(order), 4), pct_start=0.05, cycle_momentum=False,
        div_factor=20, final_div_factor=50)  # fmt: skip
    began = time.perf_counter()
    for packed, charges in tqdm(loader, "charges"):
        y = model.network(packed.to(device).graph())[:, 0]
        loss = (y - charges.to(device)).abs().mean() / model.scale[0]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
    errors = []
    with torch.no_grad():
        for k in range(0, len(check), 16):
            packed, charges = joined([check[0, i] for i in range(k, min(k + 16, len(check)))])
            errors.append((model.network(packed.to(device).graph())[:, 0].cpu() - charges).abs())
    about = {"epochs": epochs, "crystals": len(learn), "seconds": time.perf_counter() - began,
             "validation_mae_e": float(torch.cat(errors).mean())}  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(json.dumps(about))
    torch.save({k: v.cpu() for k, v in model.state_dict().items()}, file)


def one(idea: str, seed: int, args: argparse.Namespace) -> dict:
    """Train with an idea and predict; or read what is there."""
    plan, chosen = IDEAS[idea], application(NAME)
    text = json.dumps([idea, plan, seed, *args.brief, args.limit, args.charges.name])
    folder = args.runs / "trials" / f"{idea}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    file = folder / "found.json"
    if file.exists():
        return json.loads(file.read_text())
    options = {**plan.get("network", {}), "start": plan.get("start") and args.charges}
    weighted = options.get("weighted", False)
    config = training.train_config(
        chosen, [f"epochs={args.brief[1]}", f"seed={seed}", *plan.get("changes", [])])
    fold = chosen.folds()[0]
    learn, check = (training.crystals_of(chosen, convergence.part(names, s, n), config, i == 0)
                    for i, (names, s, n) in enumerate((
                        (fold.train, seed, args.brief[0]), (fold.halves[0], 0, 100))))  # fmt: skip
    learn = AlteredWindows(**vars(learn), **plan.get("data", {}))
    with variants.predicting(weighted_means if weighted else None):
        result = training.train(
            config, learn, check, folder, device=args.device, progress=False,
            check_every=config.epochs, network=partial(TrialX3Mat, **options))  # fmt: skip
    names = list(fold.halves[0][: args.limit])
    if weighted:
        found = []
        for name in names:
            _, windows = convergence._cut(NAME, config.model.radius, config.model.step, name)
            y = contributions((result.model,), [windows], 20_000)[0].double().cpu()
            share = torch.as_tensor(windows.weights / windows.n_windows)
            crystal = torch.zeros(len(y), dtype=torch.long)
            found.append(float(weighted_mean(y, share, crystal, 1)))
    else:
        found = convergence.predicted([result.model], NAME, names, config.model.step)[0][0, :, 0]
    labels = chosen.labels().loc[names, list(chosen.columns)].to_numpy(float)[:, 0]
    made = {"mae": float(np.abs(np.array(found) - labels).mean()), "seconds": result.wall_s,
            "train_mae": result.history[-1]["train_mae"], "n": len(names)}  # fmt: skip
    file.write_text(json.dumps(made))
    (folder / "last.ckpt").unlink()
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=IDEAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--brief", type=int, nargs=2, default=(2000, 20),
                        help="crystals and epochs of a training")  # fmt: skip
    parser.add_argument("--limit", type=int, default=300, help="crystals that are predicted")
    parser.add_argument("--charge-epochs", type=int, default=10)
    parser.add_argument("--charge-limit", type=int, help="crystals of which charges are learned")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--name", default="trials", help="of the result")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of states")
    args = parser.parse_args()
    begun, learned = time.perf_counter(), None
    of = f"charges-{args.charge_epochs}-{args.charge_limit or 'all'}-{args.device}.pt"
    args.charges = args.runs / "trials" / of
    if any(IDEAS[idea].get("start") for idea in args.ideas):
        learn_charges(args.charges, args.device, args.charge_epochs, args.charge_limit)
        learned = json.loads(args.charges.with_suffix(".json").read_text())
    jobs = [(idea, seed) for idea in args.ideas for seed in args.seeds]
    found = side_by_side(one, [(*job, args) for job in jobs], args.jobs)
    made = dict(zip(jobs, found, strict=True))
    rows = []
    for idea in args.ideas:
        each = [made[idea, seed] for seed in args.seeds]
        rows.append({"value": idea, "mae": np.mean([m["mae"] for m in each]),
                     "mae_of_each_seed": [m["mae"] for m in each],
                     "train_mae": [m["train_mae"] for m in each],
                     "seconds": [m["seconds"] for m in each]})  # fmt: skip
        print(f"{idea}: {rows[-1]['mae']:.4f} eV")
    results.write(
        f"{NAME}/{args.name}.json",
        {"application": NAME, "unit": "eV", "half": "validation", "n": each[0]["n"],
         "n_train": args.brief[0], "epochs": args.brief[1], "seeds": args.seeds, "jobs": args.jobs,
         "device": args.device, "charges": learned, "rows": rows},
        seed=args.seeds, command=shlex.join(["python", "tools/trials.py", *sys.argv[1:]]),
        wall_s=time.perf_counter() - begun,
    )  # fmt: skip


if __name__ == "__main__":
    main()
