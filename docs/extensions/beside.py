"""Links between pages that lie outside ``docs/`` and are shown here through a link to their folder.

MyST follows ``docs/papers`` to the folder itself and then does not know the page; here its path becomes its name again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx


def name_again(app: Sphinx, tree: nodes.document) -> None:
    root = Path(app.srcdir).resolve().parent
    for link in list(tree.findall(pending_xref)):
        path = Path(link["reftarget"]) if link.get("reftype") == "myst" else Path()
        if path.is_absolute() and path.is_relative_to(root):
            name = path.relative_to(root).as_posix()
            if name in app.env.found_docs:
                link["reftarget"] = name
            else:
                download(app, link, path.with_name(path.name + ".md"))


def download(app: Sphinx, link: pending_xref, file: Path) -> None:
    """A text of the project that is no page here, such as its README: the file itself."""
    page = app.env.current_document.docname
    there = os.path.relpath(file, app.srcdir)
    made = download_reference("", "", *link.children, reftarget=file.name, refdoc=page)
    made["filename"] = app.env.dlfiles.add_file(page, there).as_posix()
    app.env.note_dependency(there, docname=page)
    link.replace_self(made)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", name_again)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
