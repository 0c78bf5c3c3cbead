"""Links between pages that lie outside ``docs/`` and are shown here through a link to their folder.

MyST follows ``docs/papers`` to the folder itself and then does not know the page; here its path becomes its name again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx


def name_again(app: Sphinx, tree: nodes.document) -> None:
    root = Path(app.srcdir).resolve().parent
    for link in tree.findall(pending_xref):
        path = Path(link["reftarget"]) if link.get("reftype") == "myst" else Path()
        if path.is_absolute() and path.is_relative_to(root):
            link["reftarget"] = path.relative_to(root).as_posix()


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", name_again)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
