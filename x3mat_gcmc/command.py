"""Simulate how much gas crystals take up: grand-canonical Monte Carlo in rigid frameworks.

Lennard-Jones and Ewald, chains of all crystals at once on processor cores or a CUDA device. A file
that cannot be used is reported and does not stop the others. Needs numba: pip install x3mat[labels]

With --out, a killed run goes on when called again, and GPUs or hosts share the work, each with its
--shard or started by torchrun; they may be others, and more or fewer, each time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from x3mat import results
from x3mat.errors import DataError, X3MatError
from x3mat_gcmc import Framework, GCMCResult, GCMCSettings, gcmc, shards
from x3mat_gcmc.forcefield import guest
from x3mat_gcmc.framework import read_framework
from x3mat_gcmc.system import settings_hash

EXAMPLES = """examples:
  x3mat gcmc my.cif --gas N2 --temperature 77 --pressure 1e5
  x3mat gcmc *.cif --mixture CO2:0.15,N2:0.85 --charges cif --json
  x3mat gcmc bare.cif --gas CO2 --charges model
  x3mat gcmc iza:LTA --force-field trappe-n2-zeolite --charges forcefield
  x3mat gcmc my.cif --temperature 77 --ladder 24 --equilibration 5000 --cycles 8000
  x3mat gcmc cifs/*.cif --gas CO2 --out uptakes --shard 0/4
  torchrun --nproc-per-node 8 --no-python x3mat gcmc cifs/*.cif --out uptakes --device cuda
"""


def mixture_of(text: str) -> dict[str, float]:
    """Gases and mole fractions of a mixture.

    Examples
    --------
    >>> mixture_of("CO2:0.15, N2:0.85")
    {'CO2': 0.15, 'N2': 0.85}
    """
    try:
        parts = [part.split(":") for part in text.split(",")]
        return {gas.strip(): float(share) for gas, share in parts}
    except ValueError:
        raise DataError(
            text, "it is no mixture", "Write gases and mole fractions as CO2:0.15,N2:0.85."
        ) from None


def framework_of(
    file: str, charges: str | None, gases: tuple[str, ...]
) -> tuple[Framework, str]:
    """A file's framework with its charges, and their kind.

    `charges` is one of the command's choices. None stands for "cif" where the file states charges;
    elsewhere for "none" if no gas feels them or it is an IZA framework, for "model" otherwise.
    """
    framework = read_framework(file)
    if charges is None:
        felt = any(site["charge"] for gas in gases for site in guest(gas)["types"].values())
        bare = "model" if felt and not file.lower().startswith("iza:") else "none"
        charges = bare if framework.charges is None else "cif"
    if charges == "model":
        from x3mat_gcmc.charges import with_predicted_charges  # takes long: PyTorch

        framework = with_predicted_charges(framework)
    return framework, charges


def simulate(
    files: list[str], settings: GCMCSettings, charges: str | None, device: str,
    checkpoint: Path | None,
) -> dict[str, tuple[GCMCResult | X3MatError, str]]:  # fmt: skip
    """For each file a result or an error, and the kind of charges (see `framework_of`); those of
    one kind run together."""
    out: dict[str, tuple[GCMCResult | X3MatError, str]] = {}
    groups: dict[str, dict[str, Framework]] = {}
    for file in dict.fromkeys(files):
        try:
            framework, kind = framework_of(file, charges, settings.gases)
        except X3MatError as error:
            out[file] = error, ""
            continue
        groups.setdefault(kind, {})[file] = framework
    for kind, members in groups.items():
        given = "cif" if kind == "model" else kind  # those that come with the framework
        found = gcmc(
            list(members.values()), replace(settings, charges=given), device=device,
            checkpoint=checkpoint, progress=sys.stderr.isatty(),
        )  # fmt: skip
        out.update((file, (result, kind)) for file, result in zip(members, found, strict=True))
    return {file: out[file] for file in files}


def as_row(file: str, result: GCMCResult | X3MatError, kind: str) -> dict:
    """A result, or why there is none, as it is printed and kept."""
    if isinstance(result, X3MatError):
        error = {"type": type(result).__name__, "cause": result.cause, "remedy": result.remedy}
        return {"file": file, "error": error}
    return {"file": file, **result.as_dict(), "charges": kind}


def simulate_into(
    folder: Path, files: list[str], shard: tuple[int, int], batch: int, settings: GCMCSettings,
    charges: str | None, device: str, checkpoint: Path | None, density: Path | None,
) -> list[dict]:  # fmt: skip
    """Rows of a shard's files. New ones are appended, `batch` at a time, to its file in `folder`;
    what is in any file there is not simulated again.

    Raises
    ------
    DataError
        The folder has results of other settings.
    """
    key, mine = settings_hash(settings, charges or ""), files[shard[0] :: shard[1]]
    known = shards.read_rows(folder)
    if any(row["settings"] != key for row in known):
        raise DataError(folder, "it has results of other settings", "Give another folder.")
    rows = {row["file"]: row for row in known}
    todo = [file for file in mine if file not in rows]
    for start in range(0, len(todo), batch):
        found = simulate(todo[start : start + batch], settings, charges, device, checkpoint)
        new = [{**as_row(file, *x), "settings": key} for file, x in found.items()]
        for result, _ in found.values():
            if density is not None and isinstance(result, GCMCResult):
                result.save_density(density)
        shards.append(shards.rows_file(folder, shard), new)
        rows.update((row["file"], row) for row in new)
    return [rows[file] for file in mine]


def as_text(file: str, result: GCMCResult) -> str:
    """One line about a result."""
    uptake = "; ".join(
        f"{gas} {x.mol_per_kg:.4g} ± {x.error_mol_per_kg:.2g} mol/kg, {x.g_per_L:.4g} g/L"
        for gas, x in result.loadings.items()
    )
    ratio = "" if result.selectivity is None else f"; selectivity {result.selectivity:.3g}"
    return f"{file}: {uptake}{ratio}; {result.seconds:.1f} s on {result.device}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 if something failed."""
    parser = argparse.ArgumentParser(
        "x3mat gcmc", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE",
        help="CIF, POSCAR or extxyz files, or IZA frameworks such as iza:LTA")  # fmt: skip
    add("--gas", default="N2", help="N2, CO2, Ar or CH4 (default N2)")
    add("--temperature", type=float, default=298.0, help="K (default 298)")
    add("--pressure", type=float, default=1e5, help="Pa (default 1e5)")
    add("--mixture", help="gases and mole fractions instead of one gas, as CO2:0.15,N2:0.85")
    add("--charges", choices=["cif", "model", "forcefield", "none"],
        help="of the framework: those of the CIF, predicted by a network that learned DDEC6 charges"
        " of QMOF, the force field's, or none; default cif where a file states charges, else model,"
        " or none for IZA frameworks and for gases without charges")  # fmt: skip
    add("--force-field", default="uff",
        help="of the framework: uff (default), or trappe-n2-zeolite for silica")  # fmt: skip
    add("--cycles", type=int, default=1000, help="sampled cycles of each chain (default 1000)")
    add("--equilibration", type=int, default=300, help="cycles before sampling (default 300)")
    add("--replicas", type=int, default=4, help="chains of each crystal (default 4)")
    add("--ladder", type=int, default=1, metavar="N",
        help="N temperatures of each chain, which exchange states (parallel tempering): for filled"
        " pores at low temperature some 20 (default 1)")  # fmt: skip
    add("--seed", type=int, default=1, help="of the random numbers (default 1)")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--checkpoint", type=Path, help="folder; the same command goes on from there after a kill")
    add("--density", type=Path, help="folder for densities of the molecules' centres, .npz")
    add("--out", type=Path, metavar="FOLDER",
        help="for rows*.jsonl with a JSON line for each crystal, instead of printing; crystals that"
        " are there are not simulated again")  # fmt: skip
    add("--shard", default=shards.own_shard(), metavar="I/N",
        help="with --out, only every N-th file from the I-th, from 0; default: torchrun's rank")
    add("--batch", type=int,
        help="with --out, crystals simulated between two writes (default 20, on CUDA 1000)")
    add("--json", action="store_true", help="print a JSON list; with --out an object")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        shard = shards.shard_of(args.shard)
        if shard[1] > 1 and args.out is None:
            raise DataError(f"shard {args.shard}", "results of shards need a common place",
                            "Give a folder with --out.")  # fmt: skip
        shards.take_device(args.device)
        shares = mixture_of(args.mixture) if args.mixture else {args.gas: 1.0}
        settings = GCMCSettings(
            gases=tuple(shares), fractions=tuple(shares.values()), temperature=args.temperature,
            pressure=args.pressure, force_field=args.force_field, cycles=args.cycles,
            equilibration=args.equilibration, replicas=args.replicas, ladder=args.ladder,
            seed=args.seed, density=args.density is not None,
        )  # fmt: skip
        if args.out is not None:
            rows = simulate_into(
                args.out, list(dict.fromkeys(args.files)), shard,
                args.batch or (20 if args.device == "cpu" else 1000), settings, args.charges,
                args.device, args.checkpoint, args.density,
            )  # fmt: skip
            about = {"out": str(args.out), "crystals": len(rows),
                     "failed": sum("error" in row for row in rows),
                     "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip
            print(json.dumps(about, indent=1) if args.json else f"{args.out}: {len(rows)} crystals,"
                  f" {about['failed']} of them not usable")  # fmt: skip
            return 0  # torchrun would stop the others
        found = simulate(args.files, settings, args.charges, args.device, args.checkpoint)
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    printed, failed = [], False
    for file, (result, kind) in found.items():
        printed.append(as_row(file, result, kind))
        if isinstance(result, X3MatError):
            failed = True
            print(f"error: {result}", file=sys.stderr)
            continue
        for warning in result.warnings:
            print(f"warning: {file}: {warning}", file=sys.stderr)
        if args.density is not None:
            result.save_density(args.density)
        if not args.json:
            print(as_text(file, result))
    if args.json:
        print(json.dumps(results.plain(printed), indent=1, ensure_ascii=False))
    return int(failed)
