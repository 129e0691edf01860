"""Search hyper-parameters of an application on its validation set, by Optuna (TPE).

A trial trains a network briefly on a random part of the training set of fold 0 and notes its error
on a part of the validation set, and what it cost. The first trials change one hyper-parameter of
the application at a time, with itself twice, with two seeds, to show the noise; Optuna's
tree-structured Parzen estimator proposes the others. The test set is not touched. Trials are kept
in a journal in the folder of runs: a killed search goes on when called again. The result is
data/results/APPLICATION/tuning.json.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from x3mat import results
from x3mat.applications import application
from x3mat.screening import side_by_side
from x3mat.training import TrainConfig, crystals_of, train, train_config

EXAMPLES = """examples:
  python tools/tune.py zeolite-n2 --trials 20 --epochs 10
  X3MAT_DATA=folder python tools/tune.py qmof-gap --limit 4000 --device cuda --jobs 3
  python tools/tune.py mof-n2 --vary model.layers=1,2,3 weight_decay=0.01,0.1
"""
WAITING = optuna.trial.TrialState.WAITING
SPACE = {
    "model.layers": [1, 2, 3, 4],
    "windows_per_crystal": [1, 2, 4, 8],
    "model.cutoff": [3.0, 3.5, 4.0, 5.0],
    "learning_rate": [5e-4, 1e-3, 2e-3, 4e-3],
    "model.l_max": [0, 1, 2, 3],
    "model.channels": [32, 64, 128],
    "crystals_per_step": [16, 32, 64],
}


def varied(text: str) -> tuple[str, list]:
    """A hyper-parameter and its values, from "model.layers=1,2,3"."""
    key, _, values = text.partition("=")
    known = asdict(TrainConfig())
    known |= {f"model.{name}": value for name, value in known.pop("model").items()}
    for name in ("epochs", "seed", "max_atoms", "model.m_max", "model.encoding"):
        del known[name]  # a trial has its own
    if key not in known:
        raise argparse.ArgumentTypeError(f"{text}: vary some of {', '.join(sorted(known))}")
    try:
        found = [type(known[key])(value) for value in values.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return key, found


def first_trials(name: str, space: dict[str, list]) -> list[dict]:
    """The application's hyper-parameters (or the values nearest to them), twice, and those with one
    of them changed."""
    known = asdict(train_config(application(name)))
    base = {key: known["model"][key[6:]] if "." in key else known[key] for key in space}
    base = {key: min(space[key], key=lambda x, v=value: abs(x - v)) for key, value in base.items()}
    changed = [{**base, key: value} for key, values in space.items() for value in values]
    return [base, base, *(trial for trial in changed if trial != base)]


def search(name: str, journal: str, seconds: float, trials: int, space: dict[str, list], seed: int,
           options: dict) -> None:  # fmt: skip
    """Run trials of the study in ``journal`` until there are ``trials`` or ``seconds`` passed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    study = optuna.load_study(study_name=name, sampler=sampler,
                              storage=JournalStorage(JournalFileBackend(journal)))
    start = time.perf_counter()

    def objective(trial: optuna.Trial) -> float:
        found = error_of(name, trial.number,
                         {key: trial.suggest_categorical(key, v) for key, v in space.items()},
                         **options)
        for key, value in found.items():
            trial.set_user_attr(key, value)
        print(f"trial {trial.number}: {found['val_mae']:.4f}, {found['seconds']:.0f} s,"
              f" {trial.params}", file=sys.stderr, flush=True)
        return found["val_mae"]

    def enough() -> bool:
        begun = [t for t in study.get_trials(deepcopy=False) if t.state != WAITING]
        return time.perf_counter() - start > seconds or len(begun) >= trials

    if not enough():  # an exception is noted and does not stop the others
        study.optimize(objective, callbacks=[lambda *_: enough() and study.stop()],
                       catch=(Exception,))  # fmt: skip


def error_of(name: str, seed: int, params: dict, *, epochs: int, limit: int, device: str) -> dict:
    """Error on the validation set after a brief training, and its cost."""
    chosen = application(name)
    changes = [f"{key}={value}" for key, value in params.items()]
    if "model.l_max" in params:
        changes.append(f"model.m_max={min(2, params['model.l_max'])}")
    config = train_config(chosen, [*changes, f"epochs={epochs}", f"seed={seed}", "max_atoms=0"])
    split, rng = chosen.folds()[0], np.random.default_rng(0)
    names = [rng.permutation(part)[:n].tolist()
             for part, n in ((split.train, limit), (split.halves[0], max(limit // 5, 8)))]
    data = [crystals_of(chosen, part, config, training=i == 0) for i, part in enumerate(names)]
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, *data, folder, device=device, progress=False, check_every=epochs)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {"val_mae": result.history[-1]["val_mae"], "seconds": result.wall_s, "peak_gib": peak,
            "parameters": sum(p.numel() for p in result.model.parameters())}


def run(jobs: list[tuple]) -> None:
    """Call :func:`search` for each job, in a process of its own."""
    side_by_side(search, jobs, len(jobs))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("application", help="as x3mat data list names it")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no trial after this time")
    parser.add_argument("--epochs", type=int, default=6, help="of a trial")
    parser.add_argument("--limit", type=int, default=4000, help="crystals that a trial learns from")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="trials side by side")
    parser.add_argument("--vary", type=varied, nargs="+", metavar="KEY=VALUE,VALUE,...",
                        help="hyper-parameters to search, instead of the usual ones")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the journal")
    args = parser.parse_args()
    name, space = args.application, dict(args.vary or SPACE)
    options = {"epochs": args.epochs, "limit": args.limit, "device": args.device}
    journal = args.runs / name / "tuning.log"
    journal.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name=name, load_if_exists=True, direction="minimize",
                                storage=JournalStorage(JournalFileBackend(str(journal))))
    if study.user_attrs.setdefault("space", space) != space:
        parser.error(f"{journal} is of another search, of {study.user_attrs['space']}:"
                     " vary the same or choose another folder by --runs")  # fmt: skip
    study.set_user_attr("space", space)
    if not study.get_trials(deepcopy=False):
        for params in first_trials(name, space):
            study.enqueue_trial(params)
    jobs = [(name, str(journal), args.seconds, args.trials, space, k, options)
            for k in range(args.jobs)]
    run(jobs)
    done = [t for t in study.get_trials() if t.state == optuna.trial.TrialState.COMPLETE]
    results.write(
        f"{name}/tuning.json",
        {"application": name, "fold": 0, **options, "jobs": args.jobs,
         "trials": [{**t.params, **t.user_attrs} for t in done]},
        seed=0, command=shlex.join(["python", "tools/tune.py", *sys.argv[1:]]),
        wall_s=sum(t.duration.total_seconds() for t in done) / args.jobs,
    )  # fmt: skip
    for t in sorted(done, key=lambda t: t.value)[:5]:
        print(f"{t.value:.4f}", f"{t.user_attrs['seconds']:.0f} s", t.params)


if __name__ == "__main__":
    main()
