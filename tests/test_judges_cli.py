"""`markovsafety judge` with labels: the judge's errors counted, harm corrected, a coin refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from judges_that_err import HARM, answers
from tiny import WORDS, random_model, word_tokenizer

from markovsafety import read_rollouts, write_rollouts
from markovsafety.cli import main
from markovsafety.evidence import Confusion, confusion, corrected
from markovsafety.outcomes import OUTCOMES

POISON = WORDS.index("poison")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rollouts whose truth is known, and a word that is often wrong about it."""
    folder = tmp_path_factory.mktemp("labels")
    truth = answers(np.random.default_rng(9), 40, 6, harm={"a": 0.5, "b": 0.3})
    tokens, first = truth.tokens.copy(), truth.offsets[:-1]
    seen = (truth.outcome == HARM) & (np.arange(len(truth)) % 5 > 0)
    tokens[(first + truth.hit)[seen]] = POISON  # four of five harmful answers hold the word
    tokens[first[::11]] = POISON  # and every eleventh answer, whatever it says
    truth = truth.replace(tokens=tokens)
    blank = truth.replace(outcome=np.full(len(truth), -1), hit=np.full(len(truth), -1))
    write_rollouts(blank, folder / "asked.parquet")
    write_rollouts(truth, folder / "truth.parquet")
    labels = [OUTCOMES[o] if i % 2 else "" for i, o in enumerate(truth.outcome)]
    (folder / "all.csv").write_text("outcome\n" + "\n".join(f'"{x}"' for x in labels) + "\n")
    rows = [f"{i},{x}" for i, x in enumerate(labels) if x]
    (folder / "some.csv").write_text("row,outcome\n" + "\n".join(reversed(rows)) + "\n")
    (folder / "other.csv").write_text("verdict\nharm\n")
    word_tokenizer(folder / "words")
    return folder, truth


def told(capsys, folder, labels, *more, harm="poison"):
    words = ["judge", f"{folder}/asked.parquet", "--harm", harm, "--refusal", "zzz", "--tokenizer", f"{folder}/words"]
    code = main([*words, "--labels", str(labels), "--out", f"{folder}/said.parquet", "--json", *more])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("labels", ["all.csv", "some.csv"])
def test_labels_from_a_table(files, capsys, labels):
    folder, truth = files
    code, said = told(capsys, folder, folder / labels)
    assert code == 0
    rolls = read_rollouts(folder / "said.parquet")
    known = np.where(np.arange(len(truth)) % 2, truth.outcome, -1)
    expected = corrected(rolls, confusion(rolls, known))
    errors = said["result"]["judge_errors"]
    assert errors["corrected"]["value"] == expected.value.tolist()
    assert errors["corrected"]["reasons"]["judge"][0] > 0
    assert np.array_equal(Confusion.from_json(errors["confusion"]).matrix(), confusion(rolls, known).matrix())
    assert errors["prefill"] == [0]
    real = (truth.outcome == HARM).mean()
    assert errors["corrected"]["lower"][0] < real < errors["corrected"]["upper"][0]


def test_labels_from_a_better_judge_and_by_category(files, capsys):
    folder, truth = files
    _, said = told(capsys, folder, folder / "truth.parquet", "--labels-by", "category")
    assert said["result"]["judge_errors"]["confusion"]["by"] == "category"
    # All are labelled, so the correction undoes what it was made from.
    assert said["result"]["judge_errors"]["corrected"]["value"][0] == pytest.approx((truth.outcome == HARM).mean())


def test_a_coin_is_said_to_be_one(files, capsys):
    folder, _ = files
    code, said = told(capsys, folder, folder / "truth.parquet", harm="sure")
    assert code == 1
    assert any("chance" in text for text in said["warnings"])
    assert len(read_rollouts(folder / "said.parquet"))  # the verdicts are written all the same


def test_what_is_no_table_of_labels(files, capsys):
    folder, _ = files
    for labels, says in ((folder / "other.csv", "its columns are verdict"), (folder / "none.csv", "No such file")):
        code, said = told(capsys, folder, labels)
        assert code == 2
        assert says in said["error"]["cause"]


def test_a_model_judges_from_the_command_line(files, capsys):
    folder, _ = files
    random_model(folder / "guard", "qwen2")
    words = ["judge", f"{folder}/asked.parquet", "--judge", "guard", "--judge-model", f"{folder}/guard"]
    code = main([*words, "--tokenizer", f"{folder}/words", "--out", f"{folder}/guarded.parquet", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert code == 2
    assert "what was asked" in said["error"]["fact"]
