"""Local Sphinx extension: values from result files, the table of chapters, no foreign scripts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.util.docutils import SphinxDirective, SphinxRole

sys.path.insert(0, str(Path(__file__).resolve().parent))
from result_values import RESULTS, models_table, result_value, results_exist

ROOT = Path(__file__).resolve().parents[2]


class Result(SphinxRole):
    """``{result}`file.json:key:format` ``: one number of a file under data/results."""

    def run(self):
        self.env.note_dependency(str(RESULTS / self.text.split(":")[0]))
        try:
            return [nodes.Text(result_value(self.text))], []
        except ValueError as error:
            message = self.inliner.reporter.warning(str(error), line=self.lineno)
            return [nodes.problematic(self.rawtext, self.rawtext)], [message]


class IfResults(SphinxDirective):
    """Content that is shown once all the result files named as arguments exist."""

    has_content = True
    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        for name in self.arguments[0].split():
            self.env.note_dependency(str(RESULTS / name))
        if not results_exist(self.arguments[0]):
            return []
        container = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, container)
        return container.children


class Generated(SphinxDirective):
    """Content that `lines` writes."""

    def run(self):
        container = nodes.Element()
        self.content = type(self.content)(self.lines(), self.state.document.current_source)
        self.state.nested_parse(self.content, self.content_offset, container)
        return container.children


class Chapters(Generated):
    """The table of chapters, from the front matter of the notebooks."""

    def lines(self) -> list[str]:
        lines = []
        for source in sorted((ROOT / "notebooks").glob("[0-9]*.md")):
            self.env.note_dependency(str(source))
            text = source.read_text(encoding="utf-8")
            summary = yaml.safe_load(text.split("---")[1])["x3mat"]["summary"]
            title = re.search(r"^# (.+)$", text, re.M)[1]
            lines += [f"[{title}](/notebooks/{source.stem}.md)", f": {summary}", ""]
        return lines


class Models(Generated):
    """The table of models, from their summaries."""

    def lines(self) -> list[str]:
        for summary in RESULTS.glob("*/summary.json"):
            self.env.note_dependency(str(summary))
        return models_table().splitlines()


def drop_foreign_scripts(app, pagename, templatename, context, doctree):
    """Live code cells (thebe) need a server elsewhere; the book has none."""
    context["script_files"] = [
        script for script in context["script_files"]
        if "thebe" not in str(getattr(script, "filename", script) or "")
        and "thebe" not in str(getattr(script, "attributes", {}).get("body", ""))
    ]


def setup(app):
    app.add_role("result", Result())
    app.add_directive("if-results", IfResults)
    app.add_directive("chapters", Chapters)
    app.add_directive("models", Models)
    app.connect("html-page-context", drop_foreign_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
