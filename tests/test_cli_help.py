"""The help teaches: examples that can be typed, a word on every option; faults and completion of the command line."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from markovsafety import cli, cli_words, verbs
from markovsafety.cli import main
from markovsafety.errors import InputError


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


COMMANDS = commands()
EXAMPLES = [
    line.strip()
    for parser in COMMANDS.values()
    for line in (parser.epilog or "").replace("\\\n", " ").splitlines()
    if line.startswith("    markovsafety ")
]


def test_all_commands_are_listed_once():
    shown = [
        line.split()[0] for line in cli._parser().format_help().splitlines() if line[:2] == "  " and line[2:3] != " "
    ]
    assert [name for name in shown if name in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does_and_every_command_has_an_example(name):
    parser = COMMANDS[name]
    silent = [a.dest for a in parser._actions if not (a.help or "").strip()]
    assert silent == []
    assert any(example.split()[1] == name for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_can_be_typed(example):
    cli._parser().parse_args(shlex.split(example.split(" > ")[0])[1:])


def test_an_example_is_shown_as_one_types_it():
    words = cli_words.Words("what", (("why", "sample x \\\n        --out y"),), lambda v: None, "after")
    assert cli_words.epilog(words) == "examples:\n  why\n    markovsafety sample x \\\n        --out y\n\nafter"


@given(st.sampled_from(["bash", "zsh", "fish", "tcsh"]))
def test_completion_knows_commands_and_options(shell):
    script = verbs.completion(argparse.Namespace(shell=shell)).line
    assert "vulnerabilities" in script
    assert "markovsafety" in script
    if shell != "tcsh":
        assert "prefill" in script


def completed(script: str, *words: str) -> list[str]:
    """What bash offers behind these words."""
    typed = " ".join(shlex.quote(word) for word in ("markovsafety", *words))
    asked = f'COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_markovsafety; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, timeout=60)
    return done.stdout.split()


def test_bash_completes(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "vuln") == ["vulnerabilities"]
    assert completed(script, "sample", "--eng") == ["--engine"]
    assert completed(script, "sample", "--engine", "tr") == ["transformers"]


def broken(options: argparse.Namespace) -> cli.Answer:
    raise ZeroDivisionError("one by nought")


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_of_the_program_is_told_as_one(debug, capsys, monkeypatch):
    monkeypatch.setattr(verbs, "compare", broken)
    words = ["compare", "a", "b", *(["--debug"] if debug else [])]
    assert main(words) == 3
    told = capsys.readouterr().err
    assert "ZeroDivisionError: one by nought" in told
    assert "please report it" in told
    assert ("Traceback" in told) == debug
    assert main([*words, "--json"]) == 3
    body = json.loads(capsys.readouterr().out)
    assert body["ok"] is False
    assert "fault of markovsafety" in body["error"]["cause"]


@pytest.mark.parametrize("debug", [False, True])
def test_bad_input_shows_its_traceback_only_when_asked(debug, capsys):
    assert main(["solve", "no-such.npz", *(["--debug"] if debug else [])]) == 2
    told = capsys.readouterr().err
    assert "no-such.npz" in told
    assert ("Traceback" in told) == debug


@pytest.mark.parametrize(("words", "code"), [(["completion", "bash"], 0), (["solve", "no-such.npz", "--json"], 2)])
def test_a_reader_who_stops_reading_is_no_error(words, code):
    script = "import os, sys\nfrom markovsafety.cli import main\nsys.exit(main(sys.argv[1:]))"
    read, write = os_pipe()
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, "")
    assert read > 0


def test_a_pipe_that_breaks_inside_the_work_is_an_error(capsys, monkeypatch):
    def lost(options: argparse.Namespace) -> cli.Answer:
        raise BrokenPipeError(32, "a worker is gone")

    monkeypatch.setattr(verbs, "compare", lost)
    assert main(["compare", "a", "b"]) == 2
    assert "a worker is gone" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_begins_with_what_one_types(name):
    assert COMMANDS[name].format_usage().split()[1:4] == ["markovsafety", name, "[-h]"]


def os_pipe() -> tuple[int, int]:
    """A pipe whose reading end is closed already."""
    import os

    read, write = os.pipe()
    os.close(read)
    return read, write


@pytest.mark.parametrize(("seconds", "shown"), [(0.2, False), (3.4, True)])
def test_what_takes_long_says_how_long_it_took(seconds, shown, capsys, monkeypatch):
    monkeypatch.setattr(cli.time, "perf_counter", iter([100.0, 100.0 + seconds]).__next__)
    monkeypatch.setattr(verbs, "compare", lambda options: cli.Answer("done", {}))
    assert main(["compare", "a", "b"]) == 0
    out, err = capsys.readouterr()
    assert out == "done\n"
    assert ("3.4 s" in err) == shown


def test_options_that_nobody_knows_are_refused():
    with pytest.raises(InputError, match="unrecognized"):
        cli._parser().parse_args(["compare", "a", "b", "--nothing"])
