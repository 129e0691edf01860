"""Numbers of the prose, read from the files under data/results (used by the book and exporter)."""

from __future__ import annotations

import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "data" / "results"
_SPEC = re.compile(
    r"(?P<file>[^:]+\.json):(?P<key>[^:*/]+)(?:(?P<op>[*/])(?P<factor>[\d.eE+-]+))?"
    r"(?::(?P<format>.+))?"
)


def result_value(spec: str, results: Path = RESULTS) -> str:
    """The number that `spec` names, formatted.

    `spec` is ``file:key:format``: the file below data/results, the key (dots lead into nested
    objects and lists, ``*`` or ``/`` and a number convert the unit), and a Python format, which
    may be left out for text: ``zeolite-n2/summary.json:wall_s/60:.0f``.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise ValueError(f"{spec!r} is not file.json:key:format")
    path = results / match["file"]
    if not path.is_file():
        raise ValueError(f"data/results/{match['file']} does not exist")
    value = json.loads(path.read_text(encoding="utf-8"))
    try:
        for part in match["key"].split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
    except (KeyError, IndexError, ValueError, TypeError):
        raise ValueError(f"data/results/{match['file']} has no {match['key']!r}") from None
    if match["op"] == "*":
        value = value * float(match["factor"])
    elif match["op"] == "/":
        value = value / float(match["factor"])
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError(f"{spec}: {type(value).__name__} is neither a number nor text")
    return format(value, match["format"] or "").replace("-", "−" if match["format"] else "-")


def results_exist(files: str, results: Path = RESULTS) -> bool:
    """Whether all of the space-separated result `files` are there."""
    return all((results / name).is_file() for name in files.split())


def models_table(data: Path = RESULTS.parent) -> str:
    """Markdown table of the shipped models and the errors of one network on unseen crystals."""
    rows = ["| model | predicts | crystals trained, tested | mean absolute error | R² |",
            "|---|---|---|---|---|"]
    for path in sorted(data.glob("results/*/summary.json")):
        name, found = path.parent.name, json.loads(path.read_text(encoding="utf-8"))
        several = [*found.get("outputs", [""])]
        scores = [found["outputs"][column] if column else found for column in several]
        errors = ", ".join(f"{column} {score['test_mae']:#.3g}".strip()
                           for column, score in zip(several, scores, strict=True))
        r2 = ", ".join(f"{score['test_r2']:.2f}" for score in scores)
        rows.append(f"| `{name}` | {found['property']}, {found['conditions']}"
                    f" | {found['n_train'][0]:,}, {found['n_test']:,}"
                    f" | {errors} {found['unit']} | {r2} |")
    return "\n".join(rows)
