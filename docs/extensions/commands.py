"""``.. commands::``: what ``markovsafety --help`` says, one section a command."""

from __future__ import annotations

import argparse
import inspect
import os
from typing import Any
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from markovsafety import cli


def helps() -> dict[str, str]:
    """Command -> its help, 90 columns wide, without colours; the empty name is the program's own."""
    with mock.patch.dict(os.environ, {"COLUMNS": "90", "NO_COLOR": "1"}):
        parser = cli._parser()
        found = {"": parser.format_help()}
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {name: sub.format_help() for name, sub in action.choices.items()}
    return found


class Commands(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(inspect.getfile(cli))
        made: list[nodes.Node] = []
        for name, text in helps().items():
            block = nodes.literal_block(text, text, language="text")
            if not name:
                made.append(block)
                continue
            section = nodes.section(ids=[f"markovsafety-{name}"], names=[name])
            section += [nodes.title(name, name), block]
            made.append(section)
        return made


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
