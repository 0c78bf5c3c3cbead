"""Formulas as MathML: every browser of today shows it, a screen reader reads it, and no script is needed."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
TAG = re.compile(r"\\tag\{([^}]*)\}")
SAID_OTHERWISE = [(re.compile(r"\\dots\b"), r"\\ldots"), (re.compile(r"\{\\rm ([^{}]*)\}"), r"\\mathrm{\1}")]
"""Commands of TeX that the converter knows by another name."""


def formula(tex: str, node: Any, block: bool) -> str:
    """The formula as MathML; as it was written, with a warning, where it cannot be read."""
    tags = TAG.findall(tex)
    for pattern, other in SAID_OTHERWISE:
        tex = pattern.sub(other, tex)
    try:
        made = tex2mathml(TAG.sub("", tex).strip(), as_block=block)
    except MathError as error:
        LOGGER.warning("formula not understood: %s (%s)", error, tex, location=node)
        return f"<code>{escape(tex)}</code>"
    return made + "".join(f'<span class="equation-number">({escape(t)})</span>' for t in tags)


def inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(formula(node.astext(), node, block=False))
    raise nodes.SkipNode


def display(writer: Any, node: nodes.math_block) -> None:
    number = f'<span class="equation-number">({node["number"]})</span>' if node.get("number") else ""
    mark = f' id="equation-{escape(node["label"])}"' if node.get("label") else ""
    writer.body.append(f'<span class="formula"{mark}>{formula(node.astext(), node, block=True)}{number}</span>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
