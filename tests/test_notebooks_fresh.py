"""The notebooks are what the exporter makes of their sources, and the exporter is strict."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
exporter = pytest.importorskip("export_notebooks", reason="needs the extras book and test")

SOURCES = exporter.sources()
NAMES = [source.stem for source in SOURCES]


@pytest.fixture(scope="module")
def library():
    return exporter.Library()


def test_every_notebook_has_a_source_and_a_place_in_the_book():
    assert NAMES
    assert {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)
    toc = (ROOT / "_toc.yml").read_text()
    assert re.findall(r"notebooks/(\w+)", toc) == NAMES


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_notebook_is_fresh(source, library):
    text = exporter.export(source, library)
    assert source.with_suffix(".ipynb").read_text() == text, "run: make notebooks"
    assert text == exporter.export(source, library)
    notebook = nbformat.reads(text, as_version=4)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
        else:
            assert not re.search(r"\{[\w:-]+\}`|^\s*(`{3,}|:{3,})\{|^\([\w:-]+\)=$", cell.source,
                                 re.M)  # fmt: skip


@pytest.mark.parametrize("source", SOURCES, ids=NAMES)
def test_no_role_inside_a_formula(source):
    """MathJax would print it as it stands, in the book as on Colab."""
    prose = re.sub(r"^```\{code-cell\}.*?^```$", "", source.read_text(), flags=re.M | re.S)
    formulas = [f for line in prose.split("\n") for f in re.findall(r"\$([^$]+)\$", line)]
    assert formulas
    assert not [f for f in formulas if "`" in f]


def test_readme_lists_the_chapters():
    text = (ROOT / "README.md").read_text()
    assert exporter.readme(text) == text, "run: make notebooks"
    assert all(name in text for name in NAMES)


def convert(text, library):
    return exporter.Chapter(SOURCES[0], library).markdown(text)


@pytest.mark.parametrize(
    ("myst", "plain"),
    [
        ("{cite}`zhou2025x3mat`",
         "([Zhou et al., 2025](https://doi.org/10.48550/arXiv.2509.15908))"),
        ("{cite:t}`potoff2001trappe`",
         "[Potoff and Siepmann (2001)](https://doi.org/10.1002/aic.690470719)"),
        ("{term}`windows <window>` and `{cite}` in code", "*windows* and `{cite}` in code"),
        ("a {term}`site\nmap`", "a *site map*"),
        ("CO{sub}`2`, {math}`x^2`", "CO<sub>2</sub>, $x^2$"),
        ("(label)=\n## Title\n% comment", "## Title"),
        (":::{note}\nText.\n\n```python\nx = 1\n```\n:::",
         "> **Note**\n>\n> Text.\n>\n> ```python\n> x = 1\n> ```"),
        ("```{admonition} Why\n:class: dropdown\nSo.\n```",
         "<details>\n<summary>Why</summary>\n\nSo.\n\n</details>"),
        ("```{if-results} nowhere.json\nNever.\n```\nAlways.", "Always."),
        ("```\n{cite}`inside` a fence\n```", "```\n{cite}`inside` a fence\n```"),
    ],
)  # fmt: skip
def test_conversion(myst, plain, library):
    assert convert(myst, library) == plain


def test_equations_are_numbered_as_in_the_book(library):
    page = f"{exporter.BOOK}/book/notation.html"
    assert convert("{eq}`eq:mean`", library) == f"[(1)]({page}#equation-eq-mean)"
    labelled = exporter.Library()
    labelled.equations["eq:x"] = ("1.7", SOURCES[0])
    assert convert("{eq}`eq:x`\n\n$$\na\n$$ (eq:x)", labelled) == "(1.7)\n\n$$\na\n\\tag{1.7}\n$$"


def test_solution_over_several_cells(library):
    chapter = exporter.Chapter(SOURCES[0], library)
    first = chapter.markdown("```{solution-start} ex\n:class: dropdown\n```\nSo:")
    assert chapter.solution
    assert first == "<details>\n<summary>Solution</summary>\n\nSo:\n\n</details>"
    assert chapter.markdown("```{solution-end}\n```\nAfter.") == "After."
    assert not chapter.solution


@pytest.mark.parametrize(
    "myst",
    ["{foo}`x`", "```{tab-set}\nx\n```", "{cite}`nobody1999`", "{eq}`eq:none`", "note[^1]",
     "[x](none.md)", "```{note}\nnever closed", "{result}`none.json:x`"],
)  # fmt: skip
def test_refuses_what_cannot_be_shown(myst, library):
    with pytest.raises((exporter.ExportError, KeyError, ValueError)):
        convert(myst, library)
