"""Engine replay: logs of other programs become rollouts, or an error that names the line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import EOS, ids, table_engine, word_tokenizer

from markovsafety import InputError, judge, read_rollouts, sample
from markovsafety.rollouts.engines import Output
from markovsafety.rollouts.engines.replay import cut, replay, score
from markovsafety.rollouts.template import Template


def log(path, *records):
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return Template.load(word_tokenizer(tmp_path_factory.mktemp("words")))


def test_a_log_of_token_ids(tmp_path):
    path = log(
        tmp_path / "a.jsonl",
        {"prompt_id": 7, "tokens": [5, 12, 2], "prefill": 1, "outcome": "harm", "hit": 1, "category": "x"},
        {"prompt_id": 7, "tokens": [], "weight": 0.5, "note": "a\u2028b"},
        {"prompt_id": 8, "tokens": [6, 2], "outcome": None, "hit": None},
    )
    rolls = read_rollouts(path)
    assert [a.tolist() for a in rolls.answers()] == [[5, 12, 2], [], [6, 2]]
    assert rolls.prompt_id.tolist() == [7, 7, 8]
    assert rolls.category.tolist() == ["x", "all", "all"]
    assert rolls.prefill.tolist() == [1, 0, 0]
    assert rolls.outcome.tolist() == [0, -1, -1]
    assert rolls.hit.tolist() == [1, -1, -1]
    assert rolls.weight.tolist() == [1, 0.5, 1]
    assert rolls.provenance["tokens"] == "as logged"
    assert rolls.provenance["engine"]["source"] == str(path)
    assert rolls.provenance["sampling"]["eos_ids"] is None
    assert replay(path, eos_ids=[2]).provenance["sampling"]["eos_ids"] == [2]
    assert len(read_rollouts(log(tmp_path / "empty.jsonl"))) == 0


def test_a_log_of_text(tmp_path, template):
    records = [
        {"prompt": "hello", "text": "sure tea", "finish_reason": "stop"},
        {"prompt": "help", "response": "sure tea", "finish_reason": "length"},
        {"prompt": "hello", "completion": "sorry i cannot"},
        {"prompt": [{"role": "user", "content": "hello"}], "answer": "tea <eos>"},
    ]
    rolls = read_rollouts(log(tmp_path / "a.jsonl", *records), template=template)
    assert [a.tolist() for a in rolls.answers()] == [
        [*ids("sure tea"), EOS],
        ids("sure tea"),
        ids("sorry i cannot"),
        [*ids("tea"), EOS],
    ]
    assert rolls.prompt_id.tolist() == [0, 1, 0, 2]
    assert rolls.columns["prompt_tokens"][1].tolist() == ids("<bos> help")
    assert rolls.provenance["tokens"].startswith("encoded from text")
    judged = judge(rolls, "lexicon", harm=["poison"], refusal=["sorry"], template=template)
    assert judged.outcome.tolist() == [2, 3, 1, 2]
    by_folder = read_rollouts(tmp_path / "a.jsonl", template=template.folder)
    assert by_folder == rolls


def test_words_of_a_log_that_the_tokenizer_does_not_have(template):
    records = [{"prompt": "hello", "text": "sure tea"}, {"prompt": "zebra", "text": "quantum tea"}]
    told = replay(records, template=template).provenance["warnings"]
    assert [sentence.split(" hold")[0] for sentence in told] == [
        "1 of 2 prompts of the log",
        "1 of 2 answers of the log",
    ]
    assert ["'zebra'" in told[0], "'quantum'" in told[1]] == [True, True]
    assert "warnings" not in replay(records[:1], template=template).provenance
    assert "warnings" not in replay([{"prompt": "zebra", "tokens": [5]}]).provenance


def test_a_benign_answer_of_a_log_was_hit_at_its_last_token():
    assert replay([{"prompt_id": 0, "tokens": [5, 6, 2], "outcome": "benign"}]).hit.tolist() == [2]
    with pytest.raises(InputError, match="outcome refusal without the token"):
        replay([{"prompt_id": 0, "tokens": [5, 6, 2], "outcome": "refusal"}])
    with pytest.raises(InputError, match="int is no log"):
        replay(5)


def test_log_probabilities_of_a_log():
    both = [{"prompt_id": 0, "tokens": [5, 6], "prefill": 1, "logprob": [-1.0]}]
    assert np.array_equal(replay(both).columns["logprob"], [np.nan, -1], equal_nan=True)
    whole = [{"prompt_id": 0, "tokens": [5, 6], "prefill": 1, "logprob": [None, -1.0]}]
    assert replay(whole) == replay(both)
    assert "logprob" not in replay([*both, {"prompt_id": 0, "tokens": [5]}]).columns


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([1], "is no JSON object"),
        ({"tokens": [5]}, "does not say which prompt it answers"),
        ({"prompt_id": 1}, "has no answer"),
        ({"prompt_id": 1, "text": "tea"}, "there is no tokenizer"),
        ({"prompt_id": 1, "tokens": "5 6"}, "tokens are 5 6"),
        ({"prompt_id": 1, "tokens": [5, -1]}, "tokens are [5, -1]"),
        ({"prompt_id": 1, "tokens": [2**31]}, "tokens are [2147483648]"),
        ({"prompt_id": 1, "tokens": [True]}, "tokens are [True]"),
        ({"prompt_id": "a", "tokens": [5]}, "prompt_id is 'a'"),
        ({"prompt": "b", "tokens": [5]}, "prompt_id is None"),  # the first line has one
        ({"prompt_id": 1, "tokens": [5], "prefill": 2}, "prefill is 2 in an answer of 1 tokens"),
        ({"prompt_id": 1, "tokens": [5], "hit": "0"}, "hit is '0'"),
        ({"prompt_id": 1, "tokens": [5], "outcome": "bad", "hit": 0}, "unknown outcome 'bad'"),
        ({"prompt_id": 1, "tokens": [5], "logprob": [-1, -2]}, "2 log-probabilities for 1 tokens"),
        ({"prompt_id": 1, "tokens": [5], "logprob": "x"}, "logprob is no list of numbers"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path, record, says):
    path = log(tmp_path / "a.jsonl", {"prompt_id": 0, "tokens": [5], "logprob": [-1]}, record)
    with pytest.raises(InputError) as caught:
        read_rollouts(path)
    assert says in caught.value.fact
    assert "line 2" in caught.value.fact


def test_contradictions_within_a_log(tmp_path, template):
    with pytest.raises(InputError, match="text together with prefill or hit"):
        replay([{"prompt_id": 0, "text": "tea", "prefill": 1}], template=template)
    with pytest.raises(InputError, match="column hit, row 0: outcome harm without the token"):
        replay([{"prompt_id": 0, "tokens": [5], "outcome": "harm"}])
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt_id": \xff')
    with pytest.raises(InputError, match="is not JSONL"):
        read_rollouts(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        replay(tmp_path)
    with pytest.raises(InputError, match="class masses need a model"):
        replay([{"prompt_id": 0, "tokens": [5]}], classes={"bad": [12]})


def test_scoring_needs_an_engine_that_can_and_the_prompts(tmp_path):
    engine = table_engine(tmp_path)
    rolls = sample(engine, ["hello", "help", "hello"], n=2, max_tokens=3)
    with pytest.raises(InputError, match="the engine 'table' cannot score given answers"):
        score(rolls, engine)

    class Scorer(type(engine)):
        def score(self, job, answers):
            assert [p.tolist() for p in job.prompts] == [ids("<bos> hello"), ids("<bos> help")]
            assert job.prompt_of.tolist() == [0, 0, 1, 1, 0, 0]
            flat = [np.full(len(a), -1.0, np.float32) for a in answers]
            return Output(answers, flat, None, {name: [np.exp(v) for v in flat] for name in job.classes})

    scorer = Scorer(engine.tokenizer, engine.law)
    scored = score(rolls, scorer, {"bad": ["poison"]})
    assert set(scored.columns["logprob"].tolist()) == {-1.0}
    assert scored.columns["mass_bad"] == pytest.approx(np.full(len(rolls.tokens), np.exp(-1)))
    assert scored.provenance["scored"] == scorer.describe()
    with pytest.raises(InputError, match="without their prompts"):
        score(rolls.replace(columns={}), scorer)


def test_cutting_keeps_what_is_short_enough(tmp_path):
    rolls = sample(table_engine(tmp_path), ["hello", "help"], n=3, max_tokens=6)
    assert cut(rolls, n=3, max_tokens=6) == rolls
    short = cut(rolls, n=2, max_tokens=2)
    assert [a.tolist() for a in short.answers()] == [rolls.answer(i)[:2].tolist() for i in (0, 1, 3, 4)]
    assert np.array_equal(short.values("logprob", 2), rolls.values("logprob", 3)[:2])
