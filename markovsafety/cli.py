"""The command line: every verb reads files, writes one file or folder, and prints one line.

Exit codes: 0 done, 1 the answer cannot be trusted (and why), 2 bad input, 3 a fault of the program. ``--json`` prints
one object on standard output instead; progress, notes and the time it took go to standard error. Parameters carry the
functions' names. Nothing heavy is imported before a verb runs, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TextIO

from . import __version__
from .cli_words import Words, epilog
from .errors import InputError, MarkovsafetyError

__all__ = ["Answer", "main"]


@dataclass(frozen=True)
class Answer:
    """What a verb has to say: one line for people, a JSON-able result for machines, and the files it wrote."""

    line: str
    result: dict[str, Any]
    files: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    trusted: bool = True


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Parameters
    ----------
    argv : list of str, optional
        Arguments without the program's name; those of the process if not given.
    """
    words = sys.argv[1:] if argv is None else argv
    begun = time.perf_counter()
    try:
        options = _parser().parse_args(words)
    except InputError as error:
        return _failed(words[0] if words else "", "--json" in words, "--debug" in words, error, begun)
    if not getattr(options, "verb", None):
        _say(_parser().format_help().rstrip())
        return 2
    try:
        answer = options.run(options)
        _tell(options, answer, begun)
    except KeyboardInterrupt as stop:
        text = str(stop) or "what was finished is kept; the same command goes on"
        _say(f"\nmarkovsafety {options.verb}: interrupted: {text}", sys.stderr)
        return 130
    except MarkovsafetyError as error:
        return _failed(options.verb, options.json, options.debug, error, begun)
    except OSError as error:  # a file or folder that the system refuses; the functions name theirs themselves
        refused = InputError(str(error), cause=type(error).__name__, next="Check the path and its permissions.")
        refused.__cause__ = error
        return _failed(options.verb, options.json, options.debug, refused, begun)
    except Exception as error:
        return _failed(options.verb, options.json, options.debug, _Fault.of(error), begun)
    return 0 if answer.trusted else 1


def _say(text: str, file: TextIO | None = None) -> None:
    """Print on standard output or on `file`; whoever reads may have read enough (`| head`)."""
    out = sys.stdout if file is None else file
    try:
        print(text, file=out, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def _tell(options: argparse.Namespace, answer: Answer, begun: float) -> None:
    if options.json:
        _say(_envelope(options.verb, answer, begun))
        return
    _say(answer.line)
    for warning in answer.warnings:
        _say(f"note: {warning}", sys.stderr)
    if (seconds := time.perf_counter() - begun) >= 1:
        _say(f"{options.verb}: {seconds:.1f} s", sys.stderr)


class _Fault(MarkovsafetyError):
    """What no input should be able to cause: a fault of the program, with its own exit code."""

    exit_code = 3

    @classmethod
    def of(cls, error: Exception) -> _Fault:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.dirname(__file__) in f.filename]
        where = (
            f"{os.path.relpath(frames[-1].filename, os.path.dirname(__file__))}:{frames[-1].lineno}" if frames else "?"
        )
        fault = cls(
            f"{type(error).__name__}: {error}",
            cause=f"A fault of markovsafety {__version__} itself, or of a package that it uses, at {where}.",
            next="--debug shows the traceback; please report it, with the command.",
        )
        fault.__cause__ = error
        return fault


def _envelope(verb: str, answer: Answer, begun: float) -> str:
    from .bound import encode

    body = {
        "command": verb,
        "ok": answer.trusted,
        "result": encode(answer.result),
        "files": answer.files,
        "warnings": answer.warnings,
        "seconds": round(time.perf_counter() - begun, 3),
        "version": __version__,
    }
    return json.dumps(body, allow_nan=False)


def _failed(verb: str, as_json: bool, debug: bool, error: MarkovsafetyError, begun: float) -> int:
    if debug:
        _say("".join(traceback.format_exception(error)).rstrip(), sys.stderr)
    if not as_json:
        _say(f"markovsafety {verb}: {error}", sys.stderr)
        return error.exit_code
    from .bound import encode

    try:
        partial = encode(error.partial.to_json() if hasattr(error.partial, "to_json") else error.partial)
        json.dumps(partial, allow_nan=False)
    except (TypeError, ValueError):
        partial = str(error.partial)
    told = {
        "type": type(error).__name__,
        "fact": error.fact,
        "cause": error.cause,
        "next": error.next,
        "partial": partial,
    }
    body = {
        "command": verb,
        "ok": False,
        "error": told,
        "files": [],
        "warnings": [],
        "seconds": round(time.perf_counter() - begun, 3),
        "version": __version__,
    }
    _say(json.dumps(body, allow_nan=False))
    return error.exit_code


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are errors like all others, so that ``--json`` holds for them too."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise InputError(message, cause=usage, next=f"{self.prog} --help explains every argument.")


def _call(module: str, function: str) -> Callable[[argparse.Namespace], Answer]:
    """A verb that is imported only when it runs."""

    def run(options: argparse.Namespace) -> Answer:
        return getattr(importlib.import_module(f".{module}", __package__), function)(options)

    return run


# Module of the words, module of the work, commands: as the help of the program lists them.
ROAD = (
    ("the main job", (("cli_demo", "verbs", "demo"),)),
    ("from a model to a chain", (("cli_evidence", "verbs", "sample judge count estimate"),)),
    (
        "what the chain says",
        (
            ("cli_numbers", "verbs", "check solve"),
            ("cli_numbers", "verbs_sweep", "sweep"),
            ("cli_numbers", "verbs", "compare report"),
        ),
    ),
    ("inside the model", (("cli_inside", "verbs_inside", "directions heads steer"),)),
    (
        "keeping it safe",
        (
            ("cli_repair", "verbs_repair", "align"),
            ("cli_teacher", "verbs_teacher", "teacher"),
            ("cli_debias", "verbs_debias", "debias vulnerabilities"),
        ),
    ),
    (
        "around it",
        (
            ("cli_demo", "verbs", "organism"),
            ("cli_demo", "verbs_bench", "bench"),
            ("cli_demo", "verbs", "completion"),
        ),
    ),
)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="markovsafety",
        usage="markovsafety [-h] [--version] COMMAND ...",
        description="Where in the answer does safety break? Language models as Markov chains, harm as a first hit.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"markovsafety {__version__}")
    verbs = parser.add_subparsers(prog="markovsafety", dest="verb", metavar="COMMAND", help=argparse.SUPPRESS)
    told: list[str] = []
    for title, rooms in ROAD:
        told += ["", f"{title}:"]
        for of_words, of_work, names in rooms:
            known = importlib.import_module(f".{of_words}", __package__).VERBS
            for name in names.split():
                _command(verbs, name, known[name], of_work)
                told += textwrap.wrap(known[name].what, 78, initial_indent=f"  {name:<16}", subsequent_indent=" " * 18)
    parser.epilog = "\n".join([*told[1:], "", *START])
    return parser


START = (
    "start here:",
    "  markovsafety demo                                    a report on four shipped models; takes about a minute",
    "  markovsafety sample organism:shallow organism:24 --prefill 0 1 5 --out runs/shallow",
    "  markovsafety judge runs/shallow --judge organism --out shallow.parquet",
    "  markovsafety report shallow=shallow.parquet          where its safety breaks, and how sure that is",
    "",
    "markovsafety COMMAND --help shows examples. All commands take --json (one object on standard output) and --debug;",
    "exit codes: 0 done, 1 the answer cannot be trusted (and why), 2 bad input, 3 a fault of the program.",
)


def _command(verbs: Any, name: str, words: Words, work: str) -> None:
    v = verbs.add_parser(
        name,
        help=words.what,
        description=words.what[0].upper() + words.what[1:] + ("" if words.what.endswith("?") else "."),
        epilog=epilog(words),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    v.add_argument("--json", action="store_true", help="print one JSON object")
    v.add_argument("--debug", action="store_true", help="show the traceback of an error")
    v.set_defaults(run=_call(work, name))
    words.arguments(v)
