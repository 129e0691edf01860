"""The files around the package agree with each other, and numbers in prose with their files."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import x3mat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
from result_values import result_value, results_exist  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
PROSE = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md")),
         *sorted((ROOT / "notebooks").glob("*.md"))]  # fmt: skip
IMPORT_NAMES = {
    "core-mof": "CoRE_MOF", "jupyter-book": "jupyter_book", "pytest-xdist": "xdist",
    "scikit-learn": "sklearn", "sphinx-exercise": "sphinx_exercise", "zeose": "zse",
    "sphinx-proof": "sphinx_proof", "torch-geometric": "torch_geometric",
}  # fmt: skip


def requirements(extra=None):
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return [Requirement(text) for text in listed]


def tracked_files():
    try:
        done = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip("not a git repository")
    return [ROOT / name for name in done.stdout.splitlines() if "/vendor/" not in name]


def test_jupyter_book_is_version_one():
    version = metadata.version("jupyter-book")
    assert version.startswith("1."), "version 2 cannot read _config.yml and _toc.yml"


def test_environment_yml_agrees_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in environment["dependencies"] if "python" in d).removeprefix("python=")
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-c constraints.txt", "-e .[all]"]


def test_constraints_pin_every_dependency():
    pins = [
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]  # fmt: skip
    extras = [e for e in PROJECT["optional-dependencies"] if e != "all"]
    wanted = [r for extra in [None, *extras] for r in requirements(extra) if r.name != "x3mat"]
    assert len(wanted) > 20
    for python in ("3.10", "3.11", "3.12", "3.13"):
        place = {"python_version": python, "python_full_version": f"{python}.9",
                 "sys_platform": "linux", "platform_machine": "x86_64"}  # fmt: skip
        there = {
            pin.name.lower().replace("_", "-"): str(pin.specifier) for pin in pins
            if pin.marker is None or pin.marker.evaluate(place)
        }  # fmt: skip
        for requirement in wanted:
            if requirement.marker is None or requirement.marker.evaluate(place):
                pin = there[requirement.name.lower()]
                assert requirement.specifier.contains(pin.removeprefix("==")), requirement.name


def test_imports_of_the_package_are_declared():
    imported = set()
    for path in (ROOT / "x3mat").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    imported -= set(sys.stdlib_module_names) | {"x3mat", "x3mat_gcmc", "__future__"}
    needed = {IMPORT_NAMES.get(r.name, r.name) for r in requirements()}
    optional = {
        IMPORT_NAMES.get(r.name, r.name)
        for extra in ("zeolites", "mofs", "gpu", "labels", "notebooks") for r in requirements(extra)
    }  # fmt: skip
    assert imported - needed - optional == set()
    assert needed - imported == set()


def test_versions_and_addresses_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == x3mat.__version__ == citation["version"]
    repository, book = CONFIG["repository"]["url"], CONFIG["html"]["baseurl"]
    assert PROJECT["urls"]["Repository"] == citation["repository-code"] == repository
    assert PROJECT["urls"]["Documentation"] == citation["url"] == book
    readme = (ROOT / "README.md").read_text()
    assert repository in readme
    assert book in readme


def test_extras_named_anywhere_exist():
    files = [*PROSE, *(ROOT / "x3mat").rglob("*.py")]
    named = {
        extra.strip() for path in files
        for group in re.findall(r"x3mat\[([\w, ]+)\]", path.read_text())
        for extra in group.split(",")
    }  # fmt: skip
    assert named <= set(PROJECT["optional-dependencies"])


def test_no_machine_paths_and_no_registry_hosts():
    private = re.compile(r"(?<![\w.])/(?:work|home|root|Users|opt|mnt)/\w")
    names = ("pypi", "pythonhosted", "npmjs", "anaconda", "download.pytorch")
    hosts = re.compile(rf"(?:{'|'.join(names)})\.(?:org|com)")
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        assert not hosts.search(text), path
        if path.suffix in {".md", ".ipynb", ".yml", ".toml", ".cff", ".json", ".bib", ".csv"}:
            assert not private.search(text), path


def test_bibliography_leads_somewhere():
    pybtex = pytest.importorskip("pybtex.database", reason="pybtex is not installed")
    entries = pybtex.parse_file(str(ROOT / "book" / "references.bib")).entries
    for key, entry in entries.items():
        assert {"title", "year"} <= set(entry.fields), key
        assert entry.persons["author"], key
        assert re.match(r"10\.\d+/\S+$", entry.fields.get("doi", "")) or entry.fields["url"], key
    cited = {
        key.strip() for path in PROSE
        for keys in re.findall(r"\{cite(?::\w)?\}`([^`]+)`", path.read_text())
        for key in keys.split(",")
    }  # fmt: skip
    assert cited <= set(entries)


def test_numbers_in_prose_come_from_result_files():
    for path in PROSE:
        text = path.read_text()
        for block in re.finditer(r"^```+\{if-results\} ([^\n]+)$(.*?)^```+$", text, re.M | re.S):
            if not results_exist(block[1]):
                text = text.replace(block[0], "")
        for spec in re.findall(r"\{result\}`([^`]+)`", text):
            assert result_value(spec), f"{path.name}: {spec}"


def test_result_value(tmp_path):
    (tmp_path / "a").mkdir()
    content = {"mae": 0.28349, "wall_s": 5400, "unit": "g/L", "x": {"y": [1, -2.5]}, "t": True}
    (tmp_path / "a" / "b.json").write_text(json.dumps(content))
    assert result_value("a/b.json:mae:.2f", tmp_path) == "0.28"
    assert result_value("a/b.json:wall_s/3600:.1f", tmp_path) == "1.5"
    assert result_value("a/b.json:unit", tmp_path) == "g/L"
    assert result_value("a/b.json:x.y.1:.1f", tmp_path) == "−2.5"
    assert results_exist("a/b.json", tmp_path)
    assert not results_exist("a/b.json a/c.json", tmp_path)
    for wrong, why in {
        "a/c.json:mae": "does not exist", "a/b.json:none": "has no 'none'",
        "a/b.json:x": "dict is neither", "a/b.json:t": "bool is neither",
        "a/b.json": "is not file.json:key", "a/b.json:x.y.7": "has no 'x.y.7'",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=why):
            result_value(wrong, tmp_path)
