"""Exercises: the solutions pass the checks of the exercises, typical mistakes do not, blanks are "not done yet"."""

from __future__ import annotations

import ast
import doctest
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from scipy.stats import beta
from test_docs_examples import failures

import markovsafety as ms
from markovsafety import InputError, exercises

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def code(name: str) -> list[str]:
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def run(source: str, names: dict[str, Any]) -> Any:
    """The cell's last expression, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        return exec(compile(tree, "cell", "exec"), names)
    tree.body.pop()
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def play(name: str) -> tuple[dict[str, Any], list[Any]]:
    names: dict[str, Any] = {}
    shown = [run(source, names) for source in code(name) if "plot." not in source]
    return names, [x for part in shown for x in (part if isinstance(part, list) else [part])]


@pytest.fixture(scope="module")
def solved():
    return play("09_solutions")


def checks(shown):
    return [x for x in shown if isinstance(x, exercises.Checked)]


def test_solutions_are_right(solved):
    told = checks(solved[1])
    assert {x.exercise for x in told} == {*exercises.EXERCISES, *exercises.QUESTIONS}
    assert [x for x in told if x.done is not True] == []


def test_blanks_are_not_done_yet():
    told = checks(play("08_exercises")[1])
    assert {x.exercise for x in told} == {*exercises.EXERCISES, *exercises.QUESTIONS}
    assert {x.done for x in told} == {None}
    assert all(repr(x).endswith("not done yet") for x in told)


def test_both_notebooks_have_the_same_tasks_and_checks():
    """They differ in the functions and the answers, in the title and the imports, and in what stands at the end."""
    mine, theirs = (
        nbformat.read(NOTEBOOKS / f"{n}.ipynb", as_version=4).cells for n in ("08_exercises", "09_solutions")
    )
    differ = [(a.source, b.source) for a, b in list(zip(mine, theirs))[2:-1] if a.source != b.source]
    assert len(mine) == len(theirs)
    assert len(differ) == len(exercises.EXERCISES) + 1
    assert all("NotImplementedError" in blank or "..." in blank for blank, _ in differ)


def power(harmful, n, m):
    return float(np.mean(harmful) / n) ** m


def every(P, harm, ends):
    """h without a look at what cannot reach harm."""
    inner = np.setdiff1d(np.arange(len(P)), ends)
    h = np.zeros(len(P))
    h[harm] = 1
    h[inner] = np.linalg.solve(np.eye(len(inner)) - P[np.ix_(inner, inner)], P[inner, harm])
    return h


def one_form(P, Q, harm, ends, start):
    inner = np.setdiff1d(np.arange(len(P)), ends)
    N = np.zeros(len(P))
    N[inner] = np.linalg.inv(np.eye(len(inner)) - Q[np.ix_(inner, inner)])[list(inner).index(start)]
    return N * ((Q - P) @ every(P, harm, ends))


def last_within(depths, upper, budget):
    good = [k for k, end in zip(depths, upper) if end <= budget]
    return good[-1] if good else None


def floorless(a0, r0, a1, r1, budget):
    f0, f1, c1 = a0 / (a0 + r0), a1 / (a1 + r1), 1 - a1 - r1
    return max(0, int(np.ceil(np.log(max(budget - f1, 1e-9) / (f0 - f1)) / np.log(c1))))


def paths_to_counts(paths, n):
    C = np.zeros((n, n))
    for path in paths:
        np.add.at(C, (path[:-1], path[1:]), 1)
    return C


MISTAKES = {
    "kgrams": [
        lambda tokens, k: [tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1)],
        lambda tokens, k: [tuple(([-1] * k + tokens)[i : i + k][::-1]) for i in range(len(tokens) + 1)],
    ],
    "rows": [paths_to_counts, lambda paths, n: paths_to_counts(paths, n) / paths_to_counts(paths, n).sum()],
    "breaks": [lambda depths, h: depths[int(np.argmax(h))], lambda depths, h: depths[int(np.argmax(np.diff(h)))]],
    "withstands": [last_within, lambda depths, upper, budget: sum(np.array(upper) <= budget)],
    "wide": [power, lambda harmful, n, m: float(np.mean((np.array(harmful) / n) ** m))],
    "hitting": [every, lambda P, harm, ends: P[:, harm]],
    "length": [lambda P, ends: every(P, ends[0], ends), lambda P, ends: np.ones(len(P))],
    "needed": [floorless, lambda a0, r0, a1, r1, budget: 5 if budget > a1 / (a1 + r1) else None],
    "interval": [
        lambda x, n: (x / n - 1.96 * (x / n * (1 - x / n) / n) ** 0.5, x / n + 1.96 * (x / n * (1 - x / n) / n) ** 0.5),
        lambda x, n: tuple(float(q) for q in beta.ppf([0.025, 0.975], x + 0.5, n - x + 0.5)),
    ],
    "design effect": [lambda events, n: 1.0, lambda events, n: float(n)],
    "shares": [one_form, lambda P, Q, harm, ends, start: every(Q, harm, ends) - every(P, harm, ends)],
}


@pytest.mark.parametrize(("name", "which"), [(n, i) for n, found in MISTAKES.items() for i in range(len(found))])
def test_mistakes_are_noticed(name, which):
    told = exercises.check(name, MISTAKES[name][which])
    assert told.done is False
    assert len(told.told) < 1000


def test_every_exercise_has_mistakes():
    assert MISTAKES.keys() == exercises.EXERCISES.keys()


@pytest.mark.parametrize("name", exercises.EXERCISES)
@pytest.mark.parametrize("got", [0, "text", (), [[1], [1, 2]], float("nan"), object()], ids=str)
def test_nonsense_is_not_right(name, got):
    assert exercises.check(name, lambda *_: got).done is False


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_functions_that_fail_or_are_blank(name):
    def unfinished(*_):
        raise NotImplementedError

    def broken(*_):
        raise ValueError("x" * 5000)

    assert exercises.check(name, unfinished).done is None
    assert exercises.check(name, lambda *_: None).done is None
    told = exercises.check(name, broken)
    assert told.done is False
    assert "ValueError" in told.told
    assert len(told.told) < 500


def test_what_is_given_is_a_copy(solved):
    """A function that spoils its arguments spoils nothing but its own answer."""

    def spoils(P, ends):
        t = solved[0]["length"](P, ends)
        P[:] = 0
        ends.clear()
        return t

    assert exercises.check("length", spoils).done is True


def test_unknown_names():
    with pytest.raises(InputError, match="no exercise"):
        exercises.check("knitting", print)
    with pytest.raises(InputError, match="no question"):
        exercises.answer(exercises.case(), why=1)


def test_answers_to_another_model_are_wrong(solved):
    """The right answers to one seed, and their neighbours, given to others."""
    names = ("where", "how_deep", "which_change", "how_sure", "what_width")
    given = {n: solved[0][n] for n in names}
    first, other = exercises.case(0), exercises.case(3)
    assert [x.done for x in exercises.answer(first, **given)] == [True] * 5
    for name in names:
        assert any(x.done is False for x in exercises.answer(other, **given))
        wrong = {n: "none of these" if n == name else given[n] for n in names}
        assert [x.done for x in exercises.answer(first, **wrong)] == [n != name for n in names]
    # The same answers taken as independent ones give too narrow an interval.
    free = first.rolls[first.rolls.prefill == 0].outcome == 0
    narrow = tuple(
        float(x) for x in ms.bound.clopper_pearson(np.array(float(free.sum())), np.array(float(len(free))), 0.95)
    )
    assert exercises.answer(first, how_sure=narrow)[3].done is False


def test_seeds_give_different_models_and_the_same_seed_the_same():
    a, b, c = exercises.case(1), exercises.case(1), exercises.case(2)
    assert a.rolls == b.rolls
    assert (a.after.P != b.after.P).nnz == 0
    assert a.rolls != c.rolls
    assert len({str(exercises._right(exercises.case(s))) for s in range(4)}) == 4


@pytest.mark.parametrize("name", [name for name in exercises.__all__ if callable(getattr(exercises, name))])
def test_the_examples_print_what_stands_below_them(name):
    parsed = doctest.DocTestParser().get_doctest(getattr(exercises, name).__doc__, {"ms": ms}, name, None, 0)
    assert any(name in example.source for example in parsed.examples)
    assert failures(parsed) == ""
