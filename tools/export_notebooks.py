"""Generate notebooks/*.ipynb from the MyST sources notebooks/*.md, for Colab, nbmake, papermill.

Directives and roles of MyST become plain Markdown: citations are links to the papers, references
to other pages are links to the book, equations are numbered as in the book. An unknown directive
or role is an error. Outputs are never stored. The table of chapters in README.md is kept as well.

    python tools/export_notebooks.py            # write
    python tools/export_notebooks.py --check    # fail if anything would change
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import yaml
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
from result_values import models_table, result_value, results_exist  # noqa: E402

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
REPOSITORY, BRANCH = CONFIG["repository"]["url"], CONFIG["repository"]["branch"]
BOOK = CONFIG["html"]["baseurl"]
SLUG = REPOSITORY.removeprefix("https://github.com/")
RAW = f"https://raw.githubusercontent.com/{SLUG}/{BRANCH}"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"

PICTURE = (
    "book/_static/site_map_lta.png",
    "Site map of zeolite LTA: what each place in the unit cell contributes to the N2 uptake",
)

INSTALL = f'''\
# Colab only: install x3mat beside the packages that are loaded already.
import sys

if "google.colab" in sys.modules:
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    kept = {{}}
    for package in ("numpy", "scipy", "pandas", "torch", "ipython"):
        try:
            kept[package] = version(package)
        except PackageNotFoundError:
            pass
    Path("constraints.txt").write_text("\\n".join(f"{{k}}=={{v}}" for k, v in kept.items()))
    %pip install -q -c constraints.txt "x3mat[notebooks] @ git+{REPOSITORY}@{BRANCH}"
    %pip install -q --no-deps zeose
    import numpy

    if numpy.__version__ != version("numpy"):
        raise RuntimeError("NumPy was replaced: choose Runtime > Restart session, then run again.")
'''

BOXES = {
    "admonition": "", "note": "Note", "tip": "Tip", "hint": "Hint", "important": "Important",
    "warning": "Warning", "caution": "Caution", "seealso": "See also", "margin": "Aside",
    "sidebar": "", "prf:theorem": "Theorem", "prf:lemma": "Lemma", "prf:proof": "Proof",
    "prf:definition": "Definition", "prf:proposition": "Proposition", "prf:example": "Example",
    "prf:remark": "Remark", "prf:corollary": "Corollary", "prf:algorithm": "Algorithm",
    "exercise": "Exercise",
}  # fmt: skip
OPENING = ["<details>", "<summary>Solution</summary>", ""]
FENCE = re.compile(r"^(?P<fence>`{3,}|:{3,}|~{3,})(?:\{(?P<name>[\w:-]+)\})?\s*(?P<arg>.*)$")
# a role, or a code span (which stays as it is)
ROLE = re.compile(
    r"\{(?P<role>[A-Za-z][\w:-]*)\}`(?P<text>[^`]+)`|(?P<tick>`+)[^`].*?(?<!`)(?P=tick)(?!`)", re.S
)
LEFTOVER = re.compile(r"\{[A-Za-z][\w:-]*\}`|^\s*(?:`{3,}|:{3,})\{|^\([\w:-]+\)=\s*$|\[\^", re.M)


class ExportError(ValueError):
    """The source uses something that cannot be shown on Colab."""


def page_url(source: Path) -> str:
    """Address of a source page in the published book."""
    return f"{BOOK}/{source.relative_to(ROOT).with_suffix('.html').as_posix()}"


def anchor(label: str) -> str:
    """The id that Sphinx makes of a label."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def title_of(source: Path) -> str:
    return re.search(r"^# (.+)$", source.read_text(encoding="utf-8"), re.M)[1]


def sources() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9]*.md"))


class Library:
    """What a chapter may refer to: the bibliography, and labels of all pages."""

    def __init__(self) -> None:
        self.entries = parse_file(str(ROOT / "book" / "references.bib")).entries
        self.equations: dict[str, tuple[str, Path]] = {}
        self.targets: dict[str, tuple[str, Path]] = {}
        for page in [*sources(), *sorted((ROOT / "book").glob("*.md"))]:
            text = page.read_text(encoding="utf-8")
            chapter = re.match(r"\d+", page.stem)
            labels = re.findall(
                r"\$\$ *\(([\w:-]+)\)\s*$|^[`:]{3,}\{math\}[^`]*?^:label: *([\w:-]+)",
                text,
                re.M | re.S,
            )
            for number, label in enumerate(labels, 1):
                prefix = f"{int(chapter[0])}." if chapter else ""
                self.equations[label[0] or label[1]] = (f"{prefix}{number}", page)
            for match in re.finditer(r"^\(([\w:-]+)\)=\s*\n+#+ (.+)$", text, re.M):
                self.targets[match[1]] = (match[2], page)
            for match in re.finditer(
                r"\{(figure|table|exercise|exercise-start|prf:\w+|code-cell)\}[^\n]*\n"
                r"(?::[^\n]*\n)*?:(?:label|name): *([\w:-]+)", text,
            ):  # fmt: skip
                kind = match[1].split("-")[0].removeprefix("prf:")
                self.targets[match[2]] = (f"the {kind}", page)

    def citation(self, key: str, *, textual: bool = False) -> str:
        entry = self.entries[key]
        names = [" ".join(p.prelast_names + p.last_names) for p in entry.persons["author"]]
        who = names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else (
            f"{names[0]} et al."
        )  # fmt: skip
        who, year = re.sub(r"[{}]", "", who), entry.fields["year"]
        doi = entry.fields.get("doi")
        url = f"https://doi.org/{doi}" if doi else entry.fields["url"]
        return f"[{who} ({year})]({url})" if textual else f"[{who}, {year}]({url})"


class Chapter:
    """Conversion of one chapter; `solution` is True between solution-start and -end."""

    def __init__(self, source: Path, library: Library) -> None:
        self.source, self.library, self.solution = source, library, False

    def inline(self, text: str) -> str:
        text = ROLE.sub(self.role, text)
        text = re.sub(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", self.link, text)
        return re.sub(r"\]\(#[^)]*\)", f"]({page_url(self.source)})", text)

    def link(self, match: re.Match) -> str:
        path, _, place = match[1].partition("#")
        target = (
            ROOT / path.lstrip("/") if path.startswith("/") else self.source.parent / path
        ).resolve()  # fmt: skip
        if not target.is_file():
            raise ExportError(f"link to {match[1]!r}: no such file")
        if target.suffix in (".md", ".ipynb") and target.parent.name in ("notebooks", "book"):
            return f"]({page_url(target)}{'#' + place if place else ''})"
        return f"]({RAW}/{target.relative_to(ROOT).as_posix()})"

    def role(self, match: re.Match) -> str:
        role, text = match["role"], match["text"]
        if role is None:
            return match[0]
        label, target = text, text
        if named := re.fullmatch(r"(.+?)\s*<([^<>]+)>", text, re.S):
            label, target = named[1], named[2]
        if role in ("cite", "cite:p", "cite:t"):
            keys = [key.strip() for key in text.split(",")]
            links = [self.library.citation(key, textual=role == "cite:t") for key in keys]
            return ", ".join(links) if role == "cite:t" else f"({'; '.join(links)})"
        if role == "eq":
            number, page = self.library.equations[target]
            url = f"{page_url(page)}#equation-{anchor(target)}"
            return f"({number})" if page == self.source else f"[({number})]({url})"
        if role in ("ref", "numref", "prf:ref"):
            title, page = self.library.targets[target]
            shown = label if label != target else title
            return f"[{shown}]({page_url(page)}#{anchor(target)})"
        if role == "doc":
            page = (
                ROOT / (target.lstrip("/") + ".md") if target.startswith("/")
                else self.source.parent / f"{target}.md"
            ).resolve()  # fmt: skip
            return f"[{label if label != target else title_of(page)}]({page_url(page)})"
        if role == "term":
            return f"*{label}*"
        if role == "math":
            return f"${text}$"
        if role in ("sub", "sup"):
            return f"<{role}>{text}</{role}>"
        if role == "result":
            return result_value(text)
        raise ExportError(f"unknown role {{{role}}}")

    def directive(self, name: str, arg: str, body: list[str]) -> list[str]:
        options: dict[str, str] = {}
        while body and (option := re.match(r"^:([\w-]+): *(.*)$", body[0])):
            options[option[1]] = option[2]
            body = body[1:]
        body = "\n".join(body).strip("\n").split("\n")
        folded = "dropdown" in options.get("class", "")
        if name == "if-results":
            return self.lines(body) if results_exist(arg) else []
        if name == "math":
            number = self.library.equations.get(options.get("label", ""), ("",))[0]
            return ["$$", *body, *([rf"\tag{{{number}}}"] if number else []), "$$"]
        if name in ("figure", "image"):
            return [self.inline(f"![{options.get('alt', '')}]({arg})"), "", *self.lines(body)]
        if name == "exercise-start":
            return [f"**{'. '.join(filter(None, ['Exercise', self.inline(arg)]))}**", ""]
        if name == "exercise-end":
            return []
        if name == "solution-start":
            self.solution = True
            return OPENING
        if name == "solution-end":
            self.solution = False
            return ["", "</details>"]
        if name in ("solution", "dropdown") or (name in BOXES and folded):
            title = self.inline(arg) if name != "solution" and arg else BOXES.get(name, "Solution")
            opening = ["<details>", f"<summary>{title}</summary>", ""]
            return [*opening, *self.lines(body), "", "</details>"]
        if name in BOXES:
            title = ". ".join(filter(None, [BOXES[name], self.inline(arg)]))
            inner = self.lines(body)
            head = [f"**{title}**", ""] if title else []
            return [("> " + line).rstrip() for line in [*head, *inner]]
        raise ExportError(f"unknown directive {{{name}}}")

    def lines(self, lines: list[str]) -> list[str]:
        out: list[str] = []
        i = 0
        while i < len(lines):
            line = lines[i]
            match = FENCE.match(line)
            if match:
                end = next(
                    (j for j in range(i + 1, len(lines))
                     if re.fullmatch(re.escape(match["fence"][0])
                                     + f"{{{len(match['fence'])},}}\\s*", lines[j])),
                    None,
                )  # fmt: skip
                if end is None:
                    raise ExportError(f"fence never closed: {line!r}")
                body = lines[i + 1 : end]
                out += (
                    self.directive(match["name"], match["arg"].strip(), body)
                    if match["name"] else [line, *body, lines[end]]
                )  # fmt: skip
                i = end
            elif line.startswith("$$"):
                end = i if line.count("$$") == 2 else next(
                    j for j in range(i + 1, len(lines)) if lines[j].startswith("$$")
                )  # fmt: skip
                label = re.search(r"\$\$ *\(([\w:-]+)\)\s*$", lines[end])
                block = lines[i : end + 1]
                if label:
                    block[-1] = f"\\tag{{{self.library.equations[label[1]][0]}}}\n$$"
                    if end == i:
                        block = ["$$", line[2 : line.rindex("$$")].strip(), block[-1]]
                out += block
                i = end
            elif not re.match(r"^\([\w:-]+\)=\s*$|^%( |$)|^\+\+\+", line):
                out.append(self.inline(line))
            i += 1
        return out

    def markdown(self, text: str) -> str:
        was_solution = self.solution
        # a citation or reference may be broken over lines: join inside roles first
        text = ROLE.sub(lambda m: " ".join(m[0].split()) if m["role"] else m[0], text)
        lines = [*(OPENING if was_solution else []), *self.lines(text.split("\n"))]
        out = "\n".join([*lines, *(["", "</details>"] if self.solution else [])])
        out = re.sub(r"<details>\n<summary>Solution</summary>\s*</details>", "", out).strip("\n")
        outside = ROLE.sub(lambda m: m[0] if m["role"] else "", out)
        if found := LEFTOVER.search(outside):
            raise ExportError(f"left over: {found[0]!r}")
        return re.sub(r"\n{3,}", "\n\n", out)

    def notebook(self) -> nbformat.NotebookNode:
        text = self.source.read_text(encoding="utf-8")
        read = jupytext.reads(text, fmt="md:myst")
        name = self.source.stem
        colab = f"https://colab.research.google.com/github/{SLUG}/blob/{BRANCH}/notebooks/{name}.ipynb"
        head = (
            f"[![Open in Colab]({BADGE})]({colab})\n\n"
            f"A chapter of [{CONFIG['title']}]({BOOK}); [read it in the book]"
            f"({page_url(self.source)}). This file is generated: edit `notebooks/{name}.md`."
        )
        cells = [nbformat.v4.new_markdown_cell(head), nbformat.v4.new_code_cell(INSTALL.strip())]
        for cell in read.cells:
            if cell.cell_type == "code":
                metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
                source = cell.source
                if self.solution:
                    source = f"#@title Solution\n{source}"
                    metadata["cellView"] = "form"
                cells.append(nbformat.v4.new_code_cell(source, metadata=metadata))
            elif converted := self.markdown(cell.source):
                cells.append(nbformat.v4.new_markdown_cell(converted))
        for index, cell in enumerate(cells):
            cell["id"] = hashlib.sha1(f"{name}/{index}".encode()).hexdigest()[:12]
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata = nbformat.from_dict(
            {
                "kernelspec": {
                    "display_name": "Python 3", "language": "python", "name": "python3"
                },
                "language_info": {"name": "python"},
                "x3mat": dict(read.metadata.get("x3mat", {})),
            }
        )
        nbformat.validate(notebook)
        return notebook


def export(source: Path, library: Library | None = None) -> str:
    """The generated notebook of one source, as text."""
    try:
        notebook = Chapter(source, library or Library()).notebook()
    except (ExportError, KeyError, ValueError, OSError) as error:
        raise SystemExit(f"{source.relative_to(ROOT)}: {error}") from error
    return nbformat.writes(notebook, version=4, indent=1) + "\n"


def readme(text: str) -> str:
    """README.md with its tables of chapters and of models, and its picture once there is one."""
    rows = ["| chapter | what it shows | |", "|---|---|---|"]
    for source in sources():
        front = yaml.safe_load(source.read_text(encoding="utf-8").split("---")[1])
        colab = (
            f"https://colab.research.google.com/github/{SLUG}/blob/{BRANCH}"
            f"/notebooks/{source.stem}.ipynb"
        )
        rows.append(
            f"| [{title_of(source)}]({page_url(source)}) | {front['x3mat']['summary']} "
            f"| [![Open in Colab]({BADGE})]({colab}) |"
        )
    parts = {"chapters": "\n".join(rows), "models": models_table()}
    if (ROOT / PICTURE[0]).is_file():
        parts["picture"] = f"![{PICTURE[1]}]({PICTURE[0]})"
    for name, part in parts.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda match, part=part: f"{match[1]}\n{part}\n\n{match[2]}",
            text,
            flags=re.S,
        )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if stale")
    check = parser.parse_args().check
    library = Library()
    wanted = {source.with_suffix(".ipynb"): export(source, library) for source in sources()}
    wanted[ROOT / "README.md"] = readme((ROOT / "README.md").read_text(encoding="utf-8"))
    stale = [
        path for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]  # fmt: skip
    orphans = [p for p in (ROOT / "notebooks").glob("*.ipynb") if p not in wanted]
    for path in stale:
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(wanted[path], encoding="utf-8")
    for path in orphans:
        print(f"no source: {path.relative_to(ROOT)}")
    return 1 if orphans or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
