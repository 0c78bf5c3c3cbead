"""``.. shown:: depth``: a function of the plot room with the figure that its docstring's example draws.

The code on the page is the example itself, which the tests run as well. It is run here on a light and on a dark ground
and kept with the page until the function's file changes. What the directive holds is the figure said in words.
``:alone:`` leaves heading and code out.
"""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import tempfile
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import markovsafety as ms

FOLDER = "gallery"
PICTURE = """<picture class="only-{theme}"><source media="(max-width: 40rem)" srcset="{place}-column{mark}.svg">
<img src="{place}{mark}.svg" width="{wide}" height="{tall}" loading="lazy" alt="{alt}"></picture>"""
MARKS = {"light": "", "dark": "-dark"}


def example(function: Any) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(function) or "")


def run(examples: list[doctest.Example], theme: str, size: str) -> Any:
    """What an example makes last: ``ax``, or the moving picture."""
    there: dict[str, Any] = {"np": np, "ms": ms}
    with ms.plot.theme(theme, size), contextlib.redirect_stdout(io.StringIO()):
        for one in examples:
            exec(compile(one.source, "<example>", "single"), there)
    return there.get("ax", there.get("moving"))


def files(function: Any) -> tuple[dict[str, bytes], tuple[int, int], str]:
    """Files of a figure (for wide and for narrow pages), its size in pixels, and HTML where it is no image."""
    name, size, html = function.__name__, (0, 0), ""
    with tempfile.TemporaryDirectory() as folder:
        for theme, mark in MARKS.items():
            for place, ending in (("screen", ""), ("column", "-column")):
                if html:
                    break
                ax, path = run(example(function), theme, place), Path(folder) / f"{name}{ending}{mark}.svg"
                if isinstance(ax, ms.plot.Flow):
                    html = ax.html
                    ms.plot.write_csv(ax, path.with_suffix(".csv"))
                else:
                    ms.plot.save(ax, path, csv=not (mark or ending))
                    wide, tall = ax.figure.get_size_inches()
                    size = size if ending or mark else (round(96 * wide), round(96 * tall))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}, size, html


class Shown(SphinxDirective):
    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {"alone": directives.flag}

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        function = getattr(ms.plot, name)
        self.env.note_dependency(inspect.getfile(inspect.unwrap(function)))
        made, (wide, tall), html = files(function)
        kept = self.env.metadata[self.env.current_document.docname].setdefault("gallery", {})
        kept |= made
        words = " ".join(self.content)
        if not html:
            told = {"place": f"_static/{FOLDER}/{name}", "wide": wide, "tall": tall, "alt": escape(words)}
            html = "".join(PICTURE.format(theme=theme, mark=mark, **told) for theme, mark in MARKS.items())
        if "alone" in self.options:
            return [nodes.raw("", f'<div class="shown">{html}</div>', format="html"), nodes.paragraph("", words)]
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
        section += nodes.literal_block(code, code, language="python", classes=["long"])
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
