"""``.. shown:: depth``: a function of the plot room with the figure that its docstring's example draws.

The code on the page is the example itself, which the tests run as well. It is run here on a light and on a dark ground
and kept with the page until the function's file changes. What the directive holds is the figure said in words.
"""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import tempfile
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import markovsafety as ms

FOLDER = "gallery"
IMAGE = (
    '<img src="_static/{folder}/{file}" class="only-{theme}" width="{wide}" height="{tall}" loading="lazy" alt="{alt}">'
)


def example(function: Any) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(function) or "")


def run(examples: list[doctest.Example], theme: str) -> Any:
    """What an example makes last: ``ax``, or the moving picture."""
    there: dict[str, Any] = {"np": np, "ms": ms}
    with ms.plot.theme(theme), contextlib.redirect_stdout(io.StringIO()):
        for one in examples:
            exec(compile(one.source, "<example>", "single"), there)
    return there.get("ax", there.get("moving"))


def files(function: Any) -> tuple[dict[str, bytes], tuple[int, int], str]:
    """Files of a figure, its size in pixels, and HTML where it is no image."""
    name, made = function.__name__, {}
    with tempfile.TemporaryDirectory() as folder:
        for theme, mark in (("light", ""), ("dark", "-dark")):
            ax = run(example(function), theme)
            if hasattr(ax, "html"):
                ms.plot.write_csv(ax, Path(folder) / f"{name}.csv")
                break
            ms.plot.save(ax, Path(folder) / f"{name}{mark}.svg", csv=theme == "light")
        made = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    if hasattr(ax, "html"):
        return made, (0, 0), ax.html
    wide, tall = (round(96 * x) for x in ax.figure.get_size_inches())
    return made, (wide, tall), ""


class Shown(SphinxDirective):
    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        function = getattr(ms.plot, name)
        self.env.note_dependency(inspect.getfile(inspect.unwrap(function)))
        made, (wide, tall), html = files(function)
        kept = self.env.metadata[self.env.current_document.docname].setdefault("gallery", {})
        kept |= made
        words = " ".join(self.content)
        if not html:
            alt = escape(words)
            html = "".join(
                IMAGE.format(folder=FOLDER, file=file, theme=theme, wide=wide, tall=tall, alt=alt)
                for file, theme in ((f"{name}.svg", "light"), (f"{name}-dark.svg", "dark"))
            )
        code = "".join(one.source for one in example(function))
        section = nodes.section(ids=[f"plot-{name.replace('_', '-')}"], names=[name])
        title = nodes.title(name, "", nodes.literal(text=name))
        said = inspect.getdoc(function).split("\n\n")[0].replace("\n", " ")
        link = pending_xref("", refdomain="py", reftype="func", reftarget=f"markovsafety.plot.{name}", refexplicit=True)
        link += nodes.literal("", "", nodes.Text(f"ms.plot.{name}"))
        csv = f'<a href="_static/{FOLDER}/{name}.csv" download>numbers of {escape(name)} (CSV)</a>'
        first = nodes.paragraph("", "", nodes.Text(said.replace("`", "") + " Reference: "), link, nodes.Text("."))
        section += [title, first, nodes.raw("", f'<div class="shown">{html}</div>', format="html")]
        section += nodes.paragraph("", "", nodes.Text(words + " "), nodes.raw("", csv, format="html"))
        section += nodes.literal_block(code, code, language="python")
        return [section]


def write(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    folder = Path(app.outdir) / "_static" / FOLDER
    for told in app.env.metadata.values():
        for name, content in told.get("gallery", {}).items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("shown", Shown)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
