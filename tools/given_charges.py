"""Would an application's network err less if it were told the charges of the atoms?

The labels of mof-co2n2 were simulated with charges that a network predicts (x3mat_gcmc.charges).
X(3)mat is told the elements only. Here it is trained twice on the same crystals: as it is, and with
the charge beside the element, wherever that is read: in the embedding of the atoms and in the
radial networks, for the sender and for the receiver. A charge q stands as Gaussians
exp(−(q − c)² / 2w²) of fixed centres c, whose weights are learned. Trainings are brief, on parts
of the training set, and errors are those of a part of the validation half. Nothing of the test
half is read. Trainings run side by side, resume after a kill, and what is finished is kept in
the folder of runs. The result is data/results/APPLICATION/given_charges.json (or --name).

examples:
  python tools/given_charges.py mof-co2n2 --device cuda --jobs 6
  python tools/given_charges.py mof-co2n2 --seeds 0 --brief 20 2 --limit 8 --name try
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import convergence
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from x3mat import results, training
from x3mat.applications import application
from x3mat.crystal import Crystal
from x3mat.model import Edges, RadialNetwork, WindowGraph, X3Mat, X3MatConfig
from x3mat.sampling import sample_windows
from x3mat.screening import evaluate, for_each, side_by_side
from x3mat_gcmc.charges import predicted_charges

KINDS = "elements", "charges"
CENTRES = np.linspace(-1.5, 3.0, 19)  # e
WIDTH = 0.25  # e
BITS, PER_E = 12, 500  # a charge goes with the element, in units of 2 me, up to ±4 e


def coded(crystal: Crystal, charges: np.ndarray) -> Crystal:
    """A crystal whose species hold both elements and charges."""
    number = np.clip(np.rint(PER_E * charges), 1 - 2 ** (BITS - 1), 2 ** (BITS - 1) - 1)
    return replace(crystal, species=(crystal.species << BITS) + number.astype(int)
                   + 2 ** (BITS - 1))  # fmt: skip


def decoded(species: Tensor) -> tuple[Tensor, Tensor]:
    """Elements and charges, e."""
    return species >> BITS, ((species & (2**BITS - 1)) - 2 ** (BITS - 1)) / PER_E


class ChargedX3Mat(X3Mat):
    """X3Mat of crystals that :func:`coded` made; by the plain layers on all devices."""

    def __init__(self, config: X3MatConfig):
        super().__init__(config)
        self.register_buffer("centres", torch.as_tensor(CENTRES, dtype=torch.float32))
        self.embedding = self._longer(self.embedding)
        for module in self.modules():
            if isinstance(module, RadialNetwork):
                module.sender, module.receiver = map(self._longer, (module.sender, module.receiver))

    def _longer(self, table: nn.Parameter) -> nn.Parameter:
        """With a row for each centre, as large as those of the elements."""
        rows = table.new_empty(len(self.centres), table.shape[1])
        return nn.Parameter(torch.cat([table.data, rows.normal_(0, float(table.data.std()))]))

    def _kernels(self, positions: Tensor) -> None:
        return None

    def _edges(self, graph: WindowGraph) -> Edges:
        elements, charges = decoded(graph.species)
        edges = super()._edges(replace(graph, species=elements, kind=None))
        told = torch.exp(-0.5 * ((charges[:, None].to(self.centres) - self.centres) / WIDTH) ** 2)
        told = nn.functional.pad(told, (0, 0, graph.n_windows, 0)).to(edges.element)
        return replace(edges, element=torch.cat([edges.element, told], dim=1))


def _charges(name: str, crystal: str) -> tuple[str, np.ndarray]:
    torch.set_num_threads(1)
    found = predicted_charges(application(name).crystal(crystal, symprec=0.0))
    return crystal, found.astype(np.float32)


def all_charges(name: str, file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Charges of crystals, kept in a file."""
    found = dict(np.load(file)) if file.exists() else {}
    if missing := [n for n in names if n not in found]:
        every = for_each(partial(_charges, name), missing)
        found |= dict(tqdm(every, "charges", len(missing)))
        file.parent.mkdir(parents=True, exist_ok=True)
        with results.replacing(file) as out:
            np.savez(out, **found)
    return found


def crystals(args: argparse.Namespace, kind: str, config: training.TrainConfig, names: list[str],
             learn: bool) -> training.DrawnWindows:  # fmt: skip
    data = training.crystals_of(application(args.application), names, config, learn)
    if kind == "elements":
        return data
    charges = all_charges(args.application, args.charges, names)
    return replace(data, known=[(coded(crystal, charges[name]), pairs)
                                for name, (crystal, pairs) in zip(names, data.known, strict=True)])


def _cut(args: argparse.Namespace, kind: str, config: X3MatConfig, charges: dict, name: str):
    crystal = application(args.application).crystal(name)
    crystal = coded(crystal, charges[name]) if kind == "charges" else crystal
    windows = sample_windows(crystal, config.radius, config.step)
    return name, replace(windows, positions=windows.positions.astype(np.float32))


def one(kind: str, seed: int, args: argparse.Namespace) -> dict:
    """Train and predict; or read what is there."""
    chosen = application(args.application)
    config = training.train_config(chosen, [f"epochs={args.brief[1]}", f"seed={seed}"])
    text = json.dumps([kind, args.brief, args.limit, asdict(config)])
    folder = args.runs / "given-charges" / hashlib.sha256(text.encode()).hexdigest()[:16]
    file = folder / "found.json"
    if file.exists():
        return json.loads(file.read_text())
    fold = chosen.folds()[0]
    learn, check = (crystals(args, kind, config, convergence.part(names, s, n), i == 0)
                    for i, (names, s, n) in enumerate((
                        (fold.train, seed, args.brief[0]), (fold.halves[0], 0, 100))))  # fmt: skip
    network = ChargedX3Mat if kind == "charges" else X3Mat
    run = training.train(config, learn, check, folder, device=args.device, progress=False,
                         check_every=config.epochs, network=network)  # fmt: skip
    names = list(fold.halves[0][: args.limit])
    charges = all_charges(args.application, args.charges, names) if kind == "charges" else {}
    cuts = for_each(partial(_cut, args, kind, config.model, charges), names)
    with torch.no_grad():
        found = np.array([y[0] for _, y in evaluate([run.model.to(args.device)], cuts)])
    labels = chosen.labels().loc[names, list(chosen.columns)].to_numpy(float)
    errors = np.abs(found - labels)
    made = {"mae": errors.mean(), "mae_of_outputs": errors.mean(0).tolist(), "n": len(names),
            "seconds": run.wall_s, "train_mae": run.history[-1]["train_mae"]}  # fmt: skip
    file.write_text(json.dumps(made))
    (folder / "last.ckpt").unlink(missing_ok=True)
    return made


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("application", help="whose labels were simulated with predicted charges")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--brief", type=int, nargs=2, default=convergence.BRIEF,
                        help="crystals and epochs of a training")  # fmt: skip
    parser.add_argument("--limit", type=int, default=300, help="crystals that are predicted")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--name", default="given_charges", help="of the result")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of states")
    args = parser.parse_args(argv)
    begun, chosen = time.perf_counter(), application(args.application)
    args.charges = args.runs / "given-charges" / f"{args.application}.npz"
    fold = chosen.folds()[0]
    needed = {*fold.halves[0][: args.limit], *convergence.part(fold.halves[0], 0, 100)}
    for seed in args.seeds:
        needed |= set(convergence.part(fold.train, seed, args.brief[0]))
    all_charges(args.application, args.charges, sorted(needed))
    jobs = [(kind, seed) for kind in KINDS for seed in args.seeds]
    found = side_by_side(one, [(*job, args) for job in jobs], args.jobs)
    made = dict(zip(jobs, found, strict=True))
    rows = []
    for kind in KINDS:
        each = [made[kind, seed] for seed in args.seeds]
        rows.append({"told": kind, "mae": np.mean([m["mae"] for m in each]),
                     **{f"{k}_of_each_seed": [m[k] for m in each]
                        for k in ("mae", "mae_of_outputs", "train_mae", "seconds")}})  # fmt: skip
        print(f"{kind}: {rows[-1]['mae']:.4f} {chosen.unit}")
    results.write(
        f"{args.application}/{args.name}.json",
        {"application": args.application, "unit": chosen.unit, "half": "validation",
         "n": each[0]["n"], "n_train": args.brief[0], "epochs": args.brief[1],
         "seeds": args.seeds, "jobs": args.jobs, "device": args.device, "rows": rows},
        seed=args.seeds, command=shlex.join(["python", "tools/given_charges.py", *argv]),
        wall_s=time.perf_counter() - begun,
    )  # fmt: skip


if __name__ == "__main__":
    main()
