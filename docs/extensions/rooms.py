"""The reference: every public name of the package on the page of its room, in the order of the questions it answers.

``.. room:: depth profile fit`` documents the public names of ``markovsafety.depth`` that are defined in the files
``profile.py`` and ``fit.py``; without files, all names of the room. ``.. front-door::`` is the table of ``ms.``.
A single-backtick name in a docstring links to its page, whichever room it is in.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import markovsafety

LOGGER = logging.getLogger(__name__)
LONGEST = 100
"""Characters of a constant that is shown whole."""
TYPE = re.compile(r"(?<=\()\*[^*`]+\*(?=\))|(?<=: )\*[^*`]+\*(?= --)")  # as napoleon writes types
ROOMS = (
    "bound",
    "outcomes",
    "errors",
    "arithmetic",
    "chains",
    "hitting",
    "evidence",
    "evidence.rare",
    "depth",
    "rollouts",
    "interventions",
    "organism",
    "plot",
    "report",
    "toy",
)


@cache
def names(room: str) -> dict[str, str]:
    """Public names of a room, each with the file that defines it, in the order of definition within a file."""
    module = importlib.import_module(f"markovsafety.{room}")
    public = [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
    inside = Path(inspect.getfile(module))
    files = sorted(inside.parent.glob("*.py")) if inside.stem == "__init__" else [inside]
    where: dict[str, tuple[str, int]] = {}
    for path in files:
        for line, name in defined(path):
            home = getattr(getattr(module, name, None), "__module__", None)
            if name in public and home in (None, "builtins", f"markovsafety.{room}.{path.stem}", module.__name__):
                where.setdefault(name, (path.stem, line))
    for name in public:
        home = getattr(getattr(module, name), "__module__", "")
        where.setdefault(name, (home.rsplit(".", 1)[-1], 0))
    return {name: where[name][0] for name in sorted(public, key=where.__getitem__)}


def defined(path: Path) -> list[tuple[int, str]]:
    """(line, name) of what a file defines at its top level."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append((node.lineno, node.name))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [(node.lineno, t.id) for t in targets if isinstance(t, ast.Name)]
    return found


@cache
def homes() -> dict[str, str]:
    """Short name -> full name, as documented; those of ``ms.`` first, others where only one room has them."""
    full: dict[str, list[str]] = {}
    for room in ROOMS:
        for name in names(room):
            full.setdefault(name, []).append(f"markovsafety.{room}.{name}")
    doors = {name: f"markovsafety.{home}.{name}" for name, home in markovsafety._WHERE.items()}
    doors |= {name: f"markovsafety.chains.{name}" for name in ("read_chain", "write_chain")}
    return {name: where[0] for name, where in full.items() if len(where) == 1} | doors


def first_sentence(thing: Any) -> str:
    text = plain(" ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split()))
    return re.split(r"(?<=[.?!])\s", text, maxsplit=1)[0]


def plain(text: str) -> str:
    """Bars and trailing underscores of formulas and names, and the first initial of an author that begins a line:
    reStructuredText would read them as its own signs."""
    parts = re.split(r"(`+[^`]*`+)", re.sub(r"^(\s*[A-Z])\. (?=[A-Z])", r"\1\\. ", text))
    return "".join(p if i % 2 else re.sub(r"\||(?<=\w)_(?!\w)", r"\\\g<0>", p) for i, p in enumerate(parts))


def table(rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    lines = [".. list-table::", "   :widths: 30 70", "   :class: names", ""]
    for left, right in rows:
        lines += [f"   * - {left}", f"     - {right}"]
    return [*lines, ""]


def is_data(thing: Any) -> bool:
    return not (inspect.isclass(thing) or inspect.isroutine(thing))


def constant(room: str, name: str, thing: Any) -> list[str]:
    """A table or a name of the package: what kind of thing it is, and what one sees of it."""
    size = f", {len(thing)} entries" if hasattr(thing, "__len__") else ""
    shown = "".join(f"   >>> {line}\n   {told}\n" for line, told in seen(f"ms.{room}.{name}", thing))
    head = [f".. py:data:: markovsafety.{room}.{name}", "", f"   {type(thing).__name__}{size}.", ""]
    return [*head, "   .. code-block:: pycon", "", *(f"   {line}" for line in shown.splitlines()), ""]


def seen(path: str, thing: Any) -> list[tuple[str, str]]:
    """What someone types to look at a constant, and what is printed: all of it, or of a long one the first few."""
    if len(repr(thing)) <= LONGEST:
        return [(path, repr(thing))]
    if isinstance(thing, Mapping):
        return [(f"list({path})[:3]", repr(list(thing)[:3]))]
    return [(f"{path}[:6]", repr(thing[:6]))]


class Room(SphinxDirective):
    required_arguments = 1
    optional_arguments = 50

    def run(self) -> list[nodes.Node]:
        room, *files = self.arguments
        chosen = [name for name, file in names(room).items() if not files or file in files]
        if lost := set(files) - set(names(room).values()):
            raise self.error(f"markovsafety.{room} has no public name in {', '.join(sorted(lost))}")
        module = importlib.import_module(f"markovsafety.{room}")
        things = {name: getattr(module, name) for name in chosen}
        for name, thing in things.items():
            if not is_data(thing) and len(first_sentence(thing)) < 10:
                LOGGER.warning("markovsafety.%s.%s does not say what it is", room, name, location=self.get_location())
        shown = {n: t for n, t in things.items() if not is_data(t)}
        lines = table([(f"`{n} <markovsafety.{room}.{n}>`", first_sentence(t)) for n, t in shown.items()])
        for name, thing in things.items():
            if is_data(thing):
                lines += constant(room, name, thing)
            else:
                kind = "class" if inspect.isclass(thing) else "function"
                lines += [f".. auto{kind}:: markovsafety.{room}.{name}"]
                lines += ["   :members:", ""] if kind == "class" else [""]
        return self.parse_text_to_nodes(StringList(lines, source=f"markovsafety.{room}"))


class FrontDoor(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        rows = []
        for name in markovsafety.__all__:
            thing = getattr(markovsafety, name)
            if isinstance(thing, ModuleType):
                rows.append((f"``ms.{name}``", first_sentence(thing)))
            elif name != "__version__":
                said = "The four outcomes." if name == "OUTCOMES" else first_sentence(thing)
                rows.append((f"`ms.{name} <{homes()[name]}>`", said))
        return self.parse_text_to_nodes(StringList(table(rows), source="markovsafety"))


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Node) -> nodes.Node | None:
    """A short name, or one with ``ms.``, to its page; other words in backticks (parameters, fields) are no links."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].removeprefix("ms.").removeprefix("markovsafety.")
    head, _, rest = target.partition(".")
    full = homes().get(target) or (f"{homes()[head]}.{rest}" if head in homes() else f"markovsafety.{target}")
    found = env.domains.python_domain.objects.get(full)
    if found:
        there = app.builder.get_relative_uri(node["refdoc"], found.docname)
        link = nodes.reference("", "", shown.deepcopy(), internal=True, refuri=f"{there}#{found.node_id}")
        return link
    written = node["reftarget"]
    wrong = written.startswith(("ms.", "markovsafety.")) and not exists(f"markovsafety.{target}")
    return None if wrong or node.get("reftype") == "func" else shown


def link_names(app: Sphinx, tree: nodes.document) -> None:
    """``ms.something`` in a text of this folder becomes a link; a name that does not exist is reported."""
    page = app.env.current_document.docname
    if page.startswith(("papers/", "notebooks/", "reference/")):
        return
    for literal in list(tree.findall(nodes.literal)):
        name = re.match(r"ms(\.\w+)+", literal.astext())
        if name and not isinstance(literal.parent, nodes.reference | pending_xref):
            options = {"refdomain": "py", "reftype": "obj", "reftarget": name[0], "refdoc": page, "refwarn": True}
            literal.replace_self(pending_xref("", literal.deepcopy(), refexplicit=False, **options))


def exists(path: str) -> bool:
    """Whether a dotted path leads somewhere: names of inner files are shown as names, wrong ones are reported."""
    module, _, name = path.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name) or bool(importlib.import_module(path))
    except ModuleNotFoundError:
        return False


def tidy(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """After napoleon: types stand before what they describe, and link where they are classes of the package."""
    if what in ("attribute", "property"):  # napoleon takes what stands before a colon for the type
        heads = [line for line in lines if line.startswith(":type: ")]
        lines[:] = [line for line in lines if line not in heads]
        lines[:1] = [f"{head[7:]}: {lines[0]}" for head in heads] or lines[:1]
    types = dict(m.groups() for line in lines if (m := re.match(r":vartype ([^:]+): (.*)", line)))
    kept, example = [], False
    for line in lines:
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>> "))  # up to an empty line
        if m := re.match(r":ivar ([^:]+): ?(.*)", line):
            kind = f"(*{types[m[1]]}*)" + " -- " * bool(m[2]) if m[1] in types else ""
            line = f":ivar {m[1].replace(', ', ',')}: {kind}{m[2]}"  # what stands before a blank is taken for the type
        if not line.startswith(":vartype"):
            kept.append(line if example else TYPE.sub(linked, plain(line)))
    lines[:] = kept


def unsaid(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples stand in the signature; "Alias for field number 0" tells nobody more."""
    return True if str(getattr(thing, "__doc__", "")).startswith("Alias for field number") else None


def linked(match: re.Match) -> str:
    parts = re.split(rf"\b({'|'.join(classes())})\b", match[0].strip("*"))
    made = [f":py:obj:`{p}`" if i % 2 else f"*{p.strip()}*" if p.strip(" ,") else p for i, p in enumerate(parts) if p]
    return " ".join(made) if len(parts) > 1 else match[0]


@cache
def classes() -> list[str]:
    return sorted((n for n in homes() if n[0].isupper() and not n.isupper()), key=len, reverse=True)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("room", Room)
    app.add_directive("front-door", FrontDoor)
    app.connect("doctree-read", link_names)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", tidy, priority=600)
    app.connect("autodoc-skip-member", unsaid)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
