"""Make the result of an application anew, from its labels to the figures of its chapter.

Networks of all folds and seeds are trained (half an hour to two hours on a GPU; without one, days),
their records summed up, their errors analysed and set beside baselines, and the chapter run. What
stands in data/models and data/results is replaced. A killed call goes on when it is called again:
trainings resume from runs/, and what follows takes minutes. With --labels the labels are made anew
before: simulated, or those of others downloaded into the folder that X3MAT_DATA names.

examples:
  python tools/rebuild.py zeolite-n2 --list                      only say what would be run
  python tools/rebuild.py mof-co2n2 --device cuda --jobs 3
  python tools/rebuild.py qmof-gap --labels --device cuda --jobs 3
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from x3mat import paths
from x3mat.errors import X3MatError

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = {"zeolite-n2": "03_zeolites", "mof-n2": "09_mof_n2", "mof-co2n2": "10_mof_co2n2",
            "qmof-gap": "05_qmof_gap", "mof-ch4n2": "07_mof_gases",
            "mof-co2o2n2": "07_mof_gases"}  # fmt: skip
SIMULATED = (
    "tools/mof_labels.py run {name} --device {device}",
    "tools/mof_labels.py run {name} --device {device} --pass 1",
    "tools/mof_labels.py table {name}", "tools/mof_split.py {name}",
)  # fmt: skip
PUBLISHED = "tools/published_tables.py {name} --out {data}", "tools/mof_split.py {name}"
LABELS = {
    "zeolite-n2": ("tools/zeolite_gcmc.py strained", "tools/zeolite_gcmc.py labels",
                   "tools/zeolite_gcmc.py table"),
    "mof-n2": (*SIMULATED[:2], "tools/mof_labels.py run {name} --device {device} --pass 2",
               *SIMULATED[2:]),
    "mof-co2n2": SIMULATED,
    "qmof-gap": ("tools/qmof_pack.py --out {data}", "tools/mof_split.py {name}"),
    "mof-ch4n2": PUBLISHED, "mof-co2o2n2": PUBLISHED,
}  # fmt: skip
TRAINED = "x3mat train {name} --seed 0 --seed 1 --seed 2 --device {device} --jobs {jobs}"
HISTOGRAM, LOOKALIKES = "tools/energy_histogram.py {name}", "tools/lookalikes.py {name}"
TOLD = "--labels runs/places-fine --set model.channels=32"
ANALYSES = {
    "zeolite-n2": ("tools/zeolite_baselines.py",),
    "mof-n2": (HISTOGRAM, "tools/mof_n2_errors.py", LOOKALIKES),
    "mof-co2n2": (
        HISTOGRAM, "tools/mof_co2n2_errors.py", LOOKALIKES,
        "tools/places.py labels --labels runs/places-fine --device {device} --jobs {jobs}",
        f"tools/places.py table --how told --name told {TOLD} --device {{device}} --jobs {{jobs}}",
        f"tools/places.py ship {TOLD}",
    ),
    "qmof-gap": ("tools/qmof_errors.py", LOOKALIKES),
    "mof-ch4n2": (HISTOGRAM,), "mof-co2o2n2": (HISTOGRAM,),
}  # fmt: skip


def commands(name: str, device: str, jobs: int, labels: bool) -> list[list[str]]:
    """What is run, one after the other."""
    steps = [*(LABELS[name] if labels else ()), TRAINED, "tools/summarize.py {name}",
             *ANALYSES[name]]  # fmt: skip
    chapter = f"notebooks/{CHAPTERS[name]}.ipynb"
    steps.append(f"papermill {chapter} runs/rebuild/{Path(chapter).name} --cwd notebooks")
    data = paths.external() if "{data}" in " ".join(steps) else ""
    filled = [step.format(name=name, device=device, jobs=jobs, data=shlex.quote(str(data)))
              for step in steps]  # fmt: skip
    return [shlex.split("python " * step.startswith("tools/") + step) for step in filled]


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("application", choices=CHAPTERS)
    parser.add_argument("--labels", action="store_true", help="make the labels anew, too")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--list", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    (ROOT / "runs" / "rebuild").mkdir(parents=True, exist_ok=True)
    try:
        plan = commands(args.application, args.device, args.jobs, args.labels)
    except X3MatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for command in plan:
        print(shlex.join(command), flush=True)
        if args.list:
            continue
        program = Path(sys.executable).with_name(command[0])  # of this environment
        code = subprocess.call([program, *command[1:]], cwd=ROOT)
        if code:
            print(f"error: this ended with {code}. Mend it, and call again: what is done is kept.",
                  file=sys.stderr)  # fmt: skip
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
