"""The command ``x3mat``: windows, predict, explain, train, data.

Heavy packages are imported inside the commands that need them, so that help is quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from x3mat.errors import DataError, X3MatError


class _Commands(TyperGroup):
    """Turns a typed error into its message on stderr and exit code 1."""
    def invoke(self, context):
        try:
            return super().invoke(context)
        except X3MatError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="X(3)mat: what a nanoporous crystal does, and where in the crystal it comes from.")
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data", help="List, describe and print the tables of labels.")

MAX_THREADS = 8
OTHERS = {"add_help_option": False, "context_settings": {  # programs of their own
    "allow_extra_args": True, "ignore_unknown_options": True}}
os.environ.setdefault("SPGLIB_WARNING", "OFF")  # where it finds no group, a crystal is P1

Files = Annotated[list[str], typer.Argument(
    metavar="FILE", help="CIF, POSCAR or extxyz files, crystals such as iza:LTA, folders, or"
    " databases: iza, core-mof:ASR, core-mof:FSR, qmof.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: an object, for several a list.")]
Model = Annotated[str, typer.Option(help="Name of a shipped model, a checkpoint, or a folder.")]
Application = Annotated[str, typer.Argument(help="For example zeolite-n2.")]


@app.command()
def windows(
    files: Files, radius: Annotated[float, typer.Option(help="Radius of the sphere, Å.")] = 6.0,
    step: Annotated[float, typer.Option(help="Largest grid spacing, Å.")] = 2.0,
    no_symmetry: Annotated[bool, typer.Option("--no-symmetry", help="Keep all windows.")] = False,
    as_json: Json = False) -> None:
    """Cut crystals into windows and describe them.

    \b
    Examples:
      x3mat windows LTA.cif
      x3mat windows *.cif --radius 8 --json
      x3mat windows iza:LTA iza:MFI --no-symmetry
    """
    from x3mat.databases import crystal as read
    from x3mat.sampling import sample_windows
    def one(file: str) -> dict:
        started = time.perf_counter()
        crystal = read(file)
        w = sample_windows(crystal, radius, step, symmetry=not no_symmetry)
        atoms = w.atoms_per_window.repeat(w.weights).tolist()
        counts = {"min": min(atoms), "median": float(median(atoms)), "max": max(atoms)}
        return {"file": file, "formula": crystal.formula, "n_atoms": crystal.n_atoms,
                "space_group": f"{crystal.space_group_symbol} ({crystal.space_group})",
                "grid": list(w.grid), "n_windows": w.n_windows, "n_orbits": w.n_orbits,
                "atoms_per_window": counts, "seconds": round(time.perf_counter() - started, 4)}

    def text(r: dict) -> str:
        n = r["atoms_per_window"]
        return (f"{r['file']}: {r['formula']}, {r['n_atoms']} atoms, {r['space_group']};"
                f" grid {' x '.join(map(str, r['grid']))}, {r['n_windows']} windows,"
                f" {r['n_orbits']} orbits; {n['min']}-{n['max']} atoms per window"
                f" (median {n['median']:g}); {r['seconds']:.2f} s")

    _each(files, one, text, as_json)


@app.command()
def predict(
    files: Files, model: Model = "zeolite-n2",
    out: Annotated[Path | None, typer.Option(show_default=False,
        help="Folder for Parquet files with the results of thousands of crystals.")] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", show_default=False,
        help="With --out, only every N-th crystal from the I-th, from 0; default: torchrun's rank."
        )] = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}",
    device: Annotated[str, typer.Option(help="With --out: auto, cpu, cuda, ...")] = "auto",
    as_json: Json = False) -> None:
    """Predict a property of crystals, with its spread over the ensemble and warnings.

    With --out, a folder that pandas.read_parquet reads as one table, a killed run goes on when
    called again, and GPUs or hosts share the work, each with its --shard or started by torchrun.

    \b
    Examples:
      x3mat predict my.cif
      x3mat predict *.cif --model mof-n2 --json
      x3mat predict iza:LTA
      x3mat predict FOLDER --out predictions.parquet
      x3mat predict core-mof:ASR --model qmof-gap --out gaps.parquet --shard 0/4
      torchrun --nproc-per-node 8 --no-python x3mat predict qmof --model qmof-gap --out gaps.parquet
    """
    from x3mat.databases import crystal
    from x3mat.predict import load_model
    from x3mat.predict import predict as predict_one
    if out is None:
        ensemble = _load(model)
        return _each(files, lambda file: _prediction(file, predict_one(crystal(file), ensemble)),
                     _prediction_text, as_json)
    import torch

    from x3mat.screening import screen
    from x3mat_gcmc.shards import shard_of
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    part, started = shard_of(shard), time.perf_counter()
    ensemble = load_model(model, device.replace("auto", "cpu"))
    found = screen(_expanded(files), ensemble, out, shard=part, progress=sys.stderr.isatty())
    return _print(
        {"out": out, "crystals": len(found), "failed": int((found.error != "").sum()),
         "seconds": round(time.perf_counter() - started, 1)}, as_json,
        lambda r: f"{r['out']}: {r['crystals']} crystals, {r['failed']} of them not usable")


@app.command()
def explain(
    files: Files, model: Model = "zeolite-n2",
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("."),
    step: Annotated[float | None, typer.Option(
        help="Spacing of the map, Å; default the model's.", show_default=False)] = None,
    as_json: Json = False) -> None:
    """Map where in crystals the predicted property comes from.

    Writes the site map as .cube (for VESTA and ASE), the strongest sites as .csv, and a page .html
    with structure and isosurfaces that opens without a network.

    \b
    Examples:
      x3mat explain my.cif --out maps
      x3mat explain iza:LTA iza:ASV --out maps --step 1
    """
    from x3mat.databases import crystal
    from x3mat.maps import explain as explain_one
    ensemble = _load(model)

    def one(file: str) -> dict:
        site_map = explain_one(crystal(file), ensemble, step=step)
        return {**_prediction(file, site_map.prediction),
                "sites": [asdict(site) for site in site_map.sites], "files": site_map.save(out)}

    def text(r: dict) -> str:
        return _prediction_text(r) + "".join(f"\n  {path}" for path in r["files"].values())

    _each(files, one, text, as_json)


@app.command()
def train(
    application: Application,
    fold: Annotated[list[int] | None, typer.Option(
        help="Fold to train, from 0; may be repeated; default all.", show_default=False)] = None,
    seed: Annotated[list[int] | None, typer.Option(
        help="Seed; may be repeated; default 0.", show_default=False)] = None,
    change: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE",
        help="Change a hyper-parameter; may be repeated.", show_default=False)] = None,
    models: Annotated[Path | None, typer.Option(show_default=False,
        help="Folder for checkpoints; default data/models/APPLICATION.")] = None,
    records: Annotated[Path | None, typer.Option(show_default=False,
        help="Folder for records; default data/results/APPLICATION/runs.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder for resumable states.")] = Path("runs"),
    limit: Annotated[int | None, typer.Option(
        help="Use only so many crystals of each part.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    devices: Annotated[int, typer.Option(help="Devices that share a run.")] = 1,
    jobs: Annotated[int, typer.Option(help="Runs side by side, on all GPUs.", min=1)] = 1,
    as_json: Json = False) -> None:
    """Train models of an application on its folds; a killed run resumes when called again.

    \b
    Examples:
      x3mat train zeolite-n2 --fold 0 --seed 1
      x3mat train zeolite-n2 --seed 0 --seed 1 --seed 2 --device cuda --jobs 5
      x3mat train qmof-gap --device cuda --devices 2
      torchrun --nnodes 2 --nproc-per-node 8 ... --no-python x3mat train qmof-gap --device cuda
      x3mat train zeolite-n2 --set epochs=10 --set model.channels=16 --limit 30
    """
    from x3mat import training
    from x3mat.applications import application as find
    chosen = find(application)
    config = training.train_config(chosen, change or ())
    every = range(len(chosen.folds()))
    if unknown := sorted(set(fold or ()) - set(every)):
        raise DataError(application, f"there is no fold {unknown[0]}",
                        f"Choose from 0 to {every[-1]}.")
    done = filter(None, training.train_folds(
        chosen, [(k, replace(config, seed=s)) for s in seed or [0] for k in fold or every],
        jobs, models=models, records=records, runs=runs, limit=limit, device=device,
        devices=devices, progress=sys.stderr.isatty()))
    return _print(list(done), as_json, lambda records: "\n".join(
        f"fold {r['fold']}, seed {r['provenance']['seed']}: MAE {r['rest_mae']:.3f} {r['unit']}"
        f" on {len(r['predictions'])} held-out crystals" for r in records))


@app.command(**OTHERS)
def gcmc(context: typer.Context) -> None:
    """Simulate how much gas crystals take up; x3mat gcmc --help tells more."""
    from x3mat_gcmc.command import main
    raise typer.Exit(main(context.args))


@app.command(**OTHERS)
def bench(context: typer.Context) -> None:
    """Time the network beside a published one; x3mat bench --help tells more."""
    from x3mat import paths
    if not (root := paths.root()):
        raise DataError("x3mat bench", "it needs the repository", "Clone it; install from there.")
    raise typer.Exit(subprocess.call([sys.executable, root / "tools/bench.py", *context.args]))


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """List the applications.

    \b
    Example:
      x3mat data list
    """
    from x3mat.applications import APPLICATIONS
    _print([_about(a) for a in APPLICATIONS.values()], as_json, lambda rows: "\n".join(
        f"{r['name']}: {r['property']} in {r['unit']} ({r['conditions']})" for r in rows))


@data_app.command("describe")
def data_describe(application: Application, as_json: Json = False) -> None:
    """Describe a table of labels: columns, number of crystals, split, range of the targets.

    \b
    Example:
      x3mat data describe zeolite-n2 --json
    """
    from x3mat.applications import application as find
    chosen = find(application)
    table = chosen.labels()
    description = {
        **_about(chosen), "n_crystals": len(table), "columns": [table.index.name, *table.columns],
        "targets": list(chosen.columns),
        "folds": [{"n_train": len(f.train), "n_rest": len(f.rest)} for f in chosen.folds()],
        "range": {c: table[c].agg(["min", "median", "max"]).to_dict() for c in chosen.columns}}
    _print(description, as_json, lambda d: "\n".join(f"{k}: {v}" for k, v in d.items()))


@data_app.command("load")
def data_load(application: Application, as_json: Json = False) -> None:
    """Print a table of labels as CSV or JSON.

    \b
    Example:
      x3mat data load zeolite-n2 > labels.csv
    """
    from x3mat.applications import application as find
    table = find(application).labels()
    text = (table.reset_index().to_json(orient="records", force_ascii=False) if as_json
            else table.to_csv())
    typer.echo(text, nl=not text.endswith("\n"))


def _about(application) -> dict:
    return {key: getattr(application, key) for key in ("name", "property", "unit", "conditions")}


def _expanded(files: list[str]) -> list[str]:
    from x3mat.databases import expand
    return [source for file in files for source in expand(file)]


def _load(model: str):
    from x3mat.predict import load_model
    ensemble = load_model(model)
    import torch
    # Members side by side: many threads inside one small network would wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return replace(ensemble, workers=min(threads, MAX_THREADS))


def _each(files: list[str], one: Callable[[str], dict], text: Callable[[dict], str],
          as_json: bool) -> None:
    """Apply `one` to each file; a bad file is reported and does not stop the others."""
    from tqdm import tqdm
    files, out, failed = _expanded(files), [], False
    for file in tqdm(files, unit="file", disable=len(files) == 1 or not sys.stderr.isatty()):
        try:
            result = one(file)
        except X3MatError as error:
            failed = True
            typer.echo(f"error: {error}", err=True)
            result = {"file": file, "error": {"type": type(error).__name__,
                                              "cause": error.cause, "remedy": error.remedy}}
        else:
            if not as_json:
                typer.echo(text(result))
        out.append(result)
    if as_json:
        _print(out if len(files) > 1 else out[0], True, str)
    if failed:
        raise typer.Exit(1)


def _print(value: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    from x3mat.results import plain
    typer.echo(json.dumps(plain(value), indent=1, ensure_ascii=False) if as_json else text(value))


def _prediction(file: str, prediction) -> dict:
    return {"file": file, **{k: v for k, v in asdict(prediction).items() if k != "name"}}


def _prediction_text(r: dict) -> str:
    spread = f" ± {r['std']:.3f}" if r["std"] == r["std"] else ""  # not nan
    return (f"{r['file']}: {r['property']} {r['value']:.3f}{spread} {r['unit']}"
            f" ({r['n_windows']} windows, {r['n_orbits']} orbits)"
            + "".join(f"\n  warning: {warning}" for warning in r["warnings"]))

