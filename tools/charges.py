"""Train and check the network that gives a framework's atoms their charges.

It learns the DDEC6 charges of QMOF crystals, one for each atom: the charge of an atom is the
contribution of a window around it. Training, validation and test crystals are those of fold 0 of
qmof-gap, which keeps look-alikes together; in training only those of few atoms are used, which hold
the same surroundings for less time. Crystals and charges are read from qmof.npz, and the CIFs with
PACMOF2 charges from co2_n2_reference, in the folder that X3MAT_DATA names.

Steps: `train` writes data/forcefields/ddec6-charges.pt and data/results/mof-charge/train.json; a
killed run goes on when called again. `check` writes data/results/mof-charge/check.json: errors on
the test crystals of QMOF, by element too, and differences to PACMOF2.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from x3mat import databases, paths, results
from x3mat.applications import application
from x3mat.crystal import read_crystal, symbol
from x3mat.model import X3Mat, X3MatConfig, load_checkpoint, save_checkpoint
from x3mat.training import Batch, Item, collate, crystal_pairs
from x3mat_gcmc.charges import atom_windows, predicted_charges
from x3mat_gcmc.framework import cif_charges

EXAMPLES = """examples:
  X3MAT_DATA=folder python tools/charges.py train            # about 40 minutes on one core
  X3MAT_DATA=folder python tools/charges.py check
"""
CONFIG = X3MatConfig(l_max=1, m_max=1, channels=32, feed_forward=32, layers=2, cutoff=3.5,
                     radius=3.5, encoding="crystal")  # fmt: skip
FILE = paths.data() / "forcefields" / "ddec6-charges.pt"
RATE, DECAY, CLIP, BATCH = 3e-3, 1e-3, 10.0, 8  # AdamW's, largest norm of a gradient, crystals
FEW = 200  # crystals of the validation half that are looked at after each epoch


class Charges(Dataset):
    """Windows around all atoms of QMOF crystals, and the atoms' DDEC6 charges."""

    def __init__(self, names: list[str], most_atoms: int | None = None):
        with np.load(paths.external() / "qmof.npz") as file:
            ids, ptr, charges = (file[k] for k in ("id", "ptr", "charge_ddec6_e"))
        rows = {name: slice(ptr[i], ptr[i + 1]) for i, name in enumerate(ids.tolist())}
        self.names = [n for n in names
                      if not most_atoms or rows[n].stop - rows[n].start <= most_atoms]  # fmt: skip
        self.charges = [charges[rows[n]].astype(np.float32) for n in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Item, np.ndarray]:
        crystal = databases.qmof(self.names[i], symprec=0.0)
        windows, n = atom_windows(crystal, CONFIG.radius), crystal.n_atoms
        pairs = crystal_pairs(crystal, CONFIG.cutoff)
        return Item(windows, pairs, np.ones(n), np.zeros(1)), self.charges[i]


def join(items: list[tuple[Item, np.ndarray]]) -> tuple[Batch, torch.Tensor]:
    """A batch of crystals, and the charges of all their atoms."""
    parts, charges = zip(*items, strict=True)
    return collate(parts), torch.as_tensor(np.concatenate(charges))


class Learner(L.LightningModule):
    """Mean absolute error over atoms."""

    def __init__(self, train: Charges, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.model, self.history = X3Mat(CONFIG), []
        seen = np.concatenate(train.charges)
        with torch.no_grad():
            some = [join([train[i]])[0].graph() for i in range(min(len(train), 200))]
            degrees = torch.stack([self.model.mean_degree(graph) for graph in some])
            self.model.degree.copy_(degrees.mean(0))
            self.model.shift.fill_(float(seen.mean()))
            self.model.scale.fill_(float(seen.std()))

    def training_step(self, batch, _):
        graphs, charges = batch
        error = (self.model.network(graphs.graph())[:, 0] - charges).abs().mean()
        self.log("train", error, on_step=False, on_epoch=True, batch_size=1, prog_bar=True)
        return error / self.model.scale.mean()

    def validation_step(self, batch, _):
        graphs, charges = batch
        error = (self.model.network(graphs.graph())[:, 0] - charges).abs()
        self.log("validation", error.mean(), batch_size=len(charges), prog_bar=True)

    def on_train_epoch_end(self):
        values = self.trainer.callback_metrics
        self.history.append({k: float(values[k]) for k in ("train", "validation")})

    def on_save_checkpoint(self, checkpoint):
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint):
        self.history = checkpoint["history"]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), RATE, weight_decay=DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, max(steps, 2),
                                                       pct_start=0.1)  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class InOrder(torch.utils.data.Sampler):
    """Crystals in an order that depends on seed and epoch alone."""

    def __init__(self, n: int, seed: int, epochs: int):
        self.orders = [np.random.default_rng([seed, e]).permutation(n) for e in range(epochs)]
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.orders[0])

    def set_epoch(self, epoch: int) -> None:  # Lightning calls it
        self.epoch = epoch

    def __iter__(self):
        return iter(self.orders[self.epoch].tolist())


def train(args: argparse.Namespace) -> None:
    """The step `train`."""
    started, fold = time.perf_counter(), application("qmof-gap").folds()[0]
    learn = Charges(list(fold.train)[: args.limit], args.most_atoms)
    check = Charges(list(fold.halves[0])[: args.limit], args.most_atoms)
    check.names, check.charges = check.names[:FEW], check.charges[:FEW]
    learner = Learner(learn, args.seed)
    kept = ModelCheckpoint(args.runs, "last", save_on_train_epoch_end=True,
                           enable_version_counter=False)  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=args.epochs, callbacks=[kept], logger=False,
        gradient_clip_val=CLIP, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    last = args.runs / "last.ckpt"
    sampler = InOrder(len(learn), args.seed, args.epochs)
    trainer.fit(
        learner, DataLoader(learn, BATCH, sampler=sampler, collate_fn=join),
        DataLoader(check, BATCH, collate_fn=join), ckpt_path=last if last.exists() else None,
    )  # fmt: skip
    species = np.unique(np.concatenate([databases.qmof(n, symprec=0.0).species
                                        for n in learn.names]))  # fmt: skip
    about = {"property": "partial charge", "unit": "e", "conditions": "DDEC6, PBE, QMOF",
             "species": species.tolist(), "seed": args.seed, "epochs": args.epochs,
             "n_train": len(learn), "most_atoms": args.most_atoms}  # fmt: skip
    save_checkpoint(FILE, learner.model, about)
    results.write("mof-charge/train.json", {
        **about, "config": vars(CONFIG), "batch": BATCH, "learning_rate": RATE,
        "weight_decay": DECAY, "n_validation": len(check), "mae_e": learner.history,
        "n_atoms": sum(map(len, learn.charges)),
    }, seed=args.seed, wall_s=time.perf_counter() - started,
        command=f"python tools/charges.py train --epochs {args.epochs}")  # fmt: skip


def compared(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How two sets of charges agree."""
    return {"n": len(ours), "mae_e": np.abs(ours - theirs).mean(),
            "rmse_e": np.sqrt(((ours - theirs) ** 2).mean()),
            "r": np.corrcoef(ours, theirs)[0, 1], "mean_abs_e": np.abs(theirs).mean()}  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """The step `check`."""
    started, test = time.perf_counter(), application("qmof-gap").folds()[0].halves[1]
    data, known = Charges(list(test)[: args.limit]), set(load_checkpoint(FILE)[1]["species"])
    found, labels, species, left_out = [], [], [], []
    for name, charges in zip(tqdm(data.names), data.charges, strict=True):
        crystal = databases.qmof(name, symprec=0.0)
        if set(crystal.species.tolist()) - known:
            left_out.append(name)
            continue
        found.append(predicted_charges(crystal))
        labels.append(charges.astype(float))
        species.append(crystal.species)
    of_crystal = [compared(*pair)["mae_e"] for pair in zip(found, labels, strict=True)]
    z, q, p = map(np.concatenate, (species, labels, found))
    elements = {symbol(k): {"n": int((z == k).sum()), "mae_e": np.abs(p - q)[z == k].mean(),
                            "mean_e": q[z == k].mean(), "sd_e": q[z == k].std()}
                for k in np.unique(z)}  # fmt: skip
    of_element = np.array([elements[symbol(k)]["mean_e"] for k in z])
    reference, unknown = {}, []
    for path in sorted((paths.external() / "co2_n2_reference" / "cif").glob("*.cif")):
        crystal = read_crystal(path, symprec=0.0)
        if set(crystal.species.tolist()) - known:
            unknown.append(path.stem)
        else:
            reference[path.stem] = compared(predicted_charges(crystal), cif_charges(path))
    every = {k: [row[k] for row in reference.values()] for k in ("mae_e", "r")}
    results.write("mof-charge/check.json", {
        "qmof_test": {
            **compared(p, q), "crystals": len(found), "with_unknown_elements": left_out,
            "median_mae_of_crystals_e": np.median(of_crystal),
            "worst_mae_of_crystals_e": np.max(of_crystal),
            "mae_of_the_mean_of_each_element_e": np.abs(of_element - q).mean(),
            "elements": elements,
        },
        "pacmof2": {
            "median_mae_e": np.median(every["mae_e"]), "max_mae_e": max(every["mae_e"]),
            "median_r": np.median(every["r"]), "min_r": min(every["r"]), "crystals": reference,
            "with_unknown_elements": unknown,
        },
    }, seed=0, command="python tools/charges.py check",
        wall_s=time.perf_counter() - started)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    steps = parser.add_subparsers(required=True, metavar="STEP")
    step = steps.add_parser("train", help="learn the charges")
    step.set_defaults(function=train)
    step.add_argument("--epochs", type=int, default=10, help="default 10")
    step.add_argument("--most-atoms", type=int, default=80, help="of a crystal (default 80)")
    step.add_argument("--seed", type=int, default=0, help="default 0")
    step.add_argument("--runs", type=Path, default=Path("runs/mof-charge"), help="resumable state")
    step.add_argument("--limit", type=int, help="only the first so many crystals of each part")
    step = steps.add_parser("check", help="errors of the charges")
    step.set_defaults(function=check)
    step.add_argument("--limit", type=int, help="only the first so many test crystals")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.function(args)


if __name__ == "__main__":
    main()
