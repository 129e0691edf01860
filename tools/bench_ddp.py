"""Training on one and on two devices: crystals per second, scaling efficiency, loss curves.

Each row is a training run by x3mat.training.train, timed epoch by epoch without the first, in which
kernels are compiled and CUDA graphs captured, and the last, which validates and in which
torch.profiler times the kernels of some steps on a GPU.

    fixed    two devices share the batch of one:  rate(2, B) / 2 rate(1, B)
    weak     each has the batch of one:           rate(2, 2B) / 2 rate(1, B)
    busy     time of a GPU's kernels in a step over that of the step, undisturbed by a profiler

Windows
    zeolites  as zeolite-n2 is trained, on 64 frameworks, 22 times each in an epoch, no copies
    qmof      as qmof-gap is trained, on 2,048 crystals, 6 times each; needs X3MAT_DATA

The result file is written anew after each run, of which those of "fixed" come last; kinds that are
not run stay in it.

Examples
    python tools/bench_ddp.py --kinds qmof zeolites --seconds 180
    python tools/bench_ddp.py --kinds qmof --set windows_per_crystal=12 max_atoms=60000
    python tools/bench_ddp.py --device cpu --quick --out /tmp/ddp.json

Writes data/results/bench/ddp.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from bench import occupied

from x3mat import paths, results
from x3mat.applications import application
from x3mat.training import DrawnWindows, TrainConfig, train, train_config

EPOCHS = 4
QUICK = ["epochs=3", "crystals_per_step=4", "windows_per_crystal=2", "model.l_max=1",
         "model.m_max=1", "model.channels=8", "model.heads=2", "model.layers=1"]  # fmt: skip


def drawn(name: str, rows: slice, times: int, changes: Sequence[str]) -> tuple:
    """Hyper-parameters of an application, and some of its crystals several times over."""
    chosen = application(name)
    config = train_config(chosen, changes)
    targets = chosen.labels().loc[:, list(chosen.columns)].iloc[rows]
    return config, DrawnWindows(
        list(targets.index) * times, partial(chosen.crystal, symprec=0.0),
        np.tile(targets.to_numpy(float), (times, 1)), config.model, config.windows_per_crystal,
    )  # fmt: skip


def zeolites(changes: Sequence[str], quick: bool) -> tuple[TrainConfig, DrawnWindows]:
    rows, times = (slice(None, None, 32), 1) if quick else (slice(None, None, 4), 22)
    return drawn("zeolite-n2", rows, times, [*changes, *QUICK * quick])


def qmof(changes: Sequence[str], quick: bool) -> tuple[TrainConfig, DrawnWindows]:
    rows, times = (slice(16), 1) if quick else (slice(2048), 6)
    return drawn("qmof-gap", rows, times, [*changes, *QUICK * quick])


KINDS = {"zeolites": zeolites, "qmof": qmof}


class Kernels(L.Callback):
    """Time of the first GPU's kernels in a step (without overlap), as ``ms`` in the checkpoint."""

    def __init__(self, epoch: int, steps: tuple[int, int]):
        self.epoch, self.steps, self.ms = epoch, steps, None
        self.profile: torch.profiler.profile | None = None

    def on_train_batch_start(self, trainer, learner, batch, k: int) -> None:
        if learner.device.type != "cuda" or trainer.current_epoch != self.epoch:
            return
        if k == self.steps[0]:
            self.profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profile.start()
        if k == self.steps[1] and self.profile:
            torch.cuda.synchronize()
            self.profile.stop()
            self.ms = occupied(self.profile.events()) / (self.steps[1] - self.steps[0])
            self.profile = None

    def state_dict(self) -> dict:
        return {"ms": self.ms}


def measure(config: TrainConfig, data: DrawnWindows, devices: int, device: str) -> dict:
    """Crystals per second of a run."""
    validation = replace(
        data, names=data.names[:8], known=data.known[:8], targets=data.targets[:8])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, data, validation, folder, device=device, devices=devices,
                    check_every=config.epochs, progress=False,
                    callbacks=[Kernels(config.epochs - 1, (10, 30))])  # fmt: skip
        state = torch.load(Path(folder, "last.ckpt"), map_location="cpu", weights_only=False)
    kernels = state["callbacks"][Kernels.__qualname__]["ms"]
    ends = [row["seconds"] for row in run.history]
    epoch = float(np.median(np.diff(ends)[:-1] if len(ends) > 2 else np.diff(ends)))
    step = 1e3 * epoch * config.crystals_per_step / len(data)
    return {"devices": devices, "batch": config.crystals_per_step, "crystals": len(data),
            "epoch_s": epoch, "crystals_per_s": len(data) / epoch, "first_epoch_s": ends[0],
            "step_ms": step, "kernels_ms": kernels, "busy": kernels and kernels / step,
            "train_mae": [row["train_mae"] for row in run.history]}  # fmt: skip


def efficiencies(rows: list[dict]) -> dict:
    """Rates on two devices over twice that on one; largest relative difference of the losses."""
    batch = min(r["batch"] for r in rows)
    by = {(r["devices"], r["batch"] // batch): r for r in rows}
    found = {}
    for name, key in (("fixed", (2, 1)), ("weak", (2, 2))):
        if (1, 1) in by and key in by:
            found[name] = by[key]["crystals_per_s"] / (2 * by[1, 1]["crystals_per_s"])
    if (1, 1) in by and (2, 1) in by:
        one, two = (np.array(by[key]["train_mae"]) for key in ((1, 1), (2, 1)))
        found["loss_difference"] = float(np.abs(two / one - 1).max())
    return found


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kinds", nargs="+", default=["zeolites", "qmof"], choices=list(KINDS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                        help="hyper-parameters, as of x3mat train")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="begin no further run after so many seconds")  # fmt: skip
    parser.add_argument("--out", type=Path, default=paths.results("bench/ddp.json"))
    options = parser.parse_args(argv)
    began, found = time.perf_counter(), {}
    if options.out.is_file():
        found = {k: v for k, v in results.read_json(options.out).items() if k != "provenance"}
    made = {kind: KINDS[kind](options.set, options.quick) for kind in options.kinds}
    for kind, (config, _) in made.items():
        about = {"model": vars(config.model), "windows_per_crystal": config.windows_per_crystal}
        found[kind] = {**about, "rows": [], "skipped": []}
    plan = [(kind, 1 + k, 1 + k) for kind in made for k in range(2)]
    for kind, devices, times in [*plan, *((kind, 2, 1) for kind in made)]:
        if time.perf_counter() - began > options.seconds:
            found[kind]["skipped"].append([devices, times])
            continue
        config, data = made[kind]
        config = config if options.quick else replace(config, epochs=EPOCHS)
        each = replace(config, crystals_per_step=times * config.crystals_per_step)
        row = measure(each, data, devices, options.device)
        found[kind]["rows"].append(row)
        found[kind] |= efficiencies(found[kind]["rows"])
        print(f"{time.perf_counter() - began:.0f} s  {kind} {row}", flush=True)
        results.write(options.out.absolute(), found, seed=0,
                      command=shlex.join(["python", "tools/bench_ddp.py", *argv]),
                      wall_s=time.perf_counter() - began)  # fmt: skip


if __name__ == "__main__":
    main()
