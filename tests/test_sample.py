"""sample(): what is asked, in which order, with which random numbers, and what survives an interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import EOS, WORDS, ids, table_engine, untrusted

from markovsafety import InputError, UntrustedError, read_rollouts, sample
from markovsafety.rollouts import LexiconJudge, Rollouts
from markovsafety.rollouts.engines import Output

ASK = {"n": 3, "max_tokens": 5}
PREFIX = ["sure step one tea", ids("sorry i cannot help")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def engine(folder):
    return table_engine(folder)


def test_order_and_columns(engine):
    prompts = ["hello", {"prompt": "help", "category": "b"}]
    rolls = sample(engine, prompts, prefill=[2, 0], prefix=PREFIX, classes={"bad": ["poison", 13]}, seed=3, **ASK)
    assert rolls.prompt_id.tolist() == [0] * 6 + [1] * 6
    assert rolls.prefill.tolist() == [2, 2, 2, 0, 0, 0] * 2
    assert rolls.category.tolist() == ["all"] * 6 + ["b"] * 6
    assert [rolls.answer(i)[:2].tolist() for i in (0, 6)] == [ids("sure step"), ids("sorry i")]
    assert (rolls.lengths - rolls.prefill <= 5).all()
    assert rolls.columns["prompt_tokens"][0].tolist() == ids("<bos> hello")
    assert rolls.columns.keys() == {"prompt_tokens", "logprob", "seed", "mass_bad"}
    assert np.isnan(rolls.values("logprob", 0)).tolist() == [True, True] + [False] * (rolls.lengths[0] - 2)
    assert len(np.unique(rolls.columns["seed"])) == 12
    assert set(rolls.outcome.tolist()) == {-1}
    told = rolls.provenance
    assert told["sampling"]["prefill"] == [2, 0]
    assert told["sampling"]["eos_ids"] == [EOS]
    assert told["logprob"]["logprob_processed"].startswith("not kept")
    assert len(told["template"]["tokenizer"]) == 64
    json.dumps(told, allow_nan=False)


def test_a_rollout_does_not_depend_on_the_others(engine):
    prompts = [{"prompt": word, "prompt_id": i} for i, word in enumerate(["hello", "help", "tea"])]
    rolls = sample(engine, prompts, prefill=[0, 1], prefix=["sure"] * 3, n=4, max_tokens=6)
    alone = sample(engine, prompts[1:2], prefill=1, prefix=["sure"], n=2, max_tokens=6)
    assert alone == rolls[(rolls.prompt_id == 1) & (rolls.prefill == 1)][:2]
    other = sample(engine, prompts, n=4, max_tokens=6, seed=1)
    assert other != rolls[rolls.prefill == 0]
    assert sample(engine, prompts, n=4, max_tokens=6) == rolls[rolls.prefill == 0]


def test_processed_log_probabilities_only_where_they_differ(engine):
    assert "logprob_processed" not in sample(engine, ["hello"], **ASK).columns
    rolls = sample(engine, ["hello"], temperature=0.5, **ASK)
    assert rolls.columns["logprob_processed"].dtype == np.float32
    assert rolls.provenance["logprob"]["logprob_processed"].startswith("processed")


# --- what is asked ---


def test_prompts_from_files(engine, tmp_path):
    (tmp_path / "a.csv").write_text(
        'prompt,category,prefix\n"hello, tea",x,sure tea\nhelp,,sorry i\n', encoding="utf-8"
    )
    lines = [
        {"prompt": "hello, tea", "category": "x", "prefix": "sure tea"},
        {"prompt": [{"role": "user", "content": "help"}], "prefix": ids("sorry i"), "prompt_id": 1},
    ]
    lines[0]["note"] = "a\u2028b"  # JSON allows it within a line
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    from_csv = sample(engine, tmp_path / "a.csv", prefill=[0, 2], **ASK)
    assert from_csv == sample(engine, str(tmp_path / "a.jsonl"), prefill=[0, 2], **ASK)
    assert from_csv == sample(engine, lines, prefill=[0, 2], **ASK)
    assert set(from_csv.category.tolist()) == {"x", "all"}
    given = [{"prompt_tokens": ids("<bos> help"), "prompt_id": 1}]
    assert sample(engine, given, **ASK) == from_csv[(from_csv.prompt_id == 1) & (from_csv.prefill == 0)]


def test_a_system_message_goes_before_the_prompt(engine):
    rolls = sample(engine, ["hello"], system="help i", **ASK)
    assert rolls.columns["prompt_tokens"][0].tolist() == ids("<bos> help i hello")


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "there are no prompts"),
        ("hello", "is not a file"),
        ([""], "prompt 0 is empty"),
        ([{"text": "hello"}], "prompt 0 is empty"),
        (["hello", 3], "prompt 1 is int"),
        ({"prompt": "hello"}, "prompts are dict"),
        ([{"prompt": "hello", "prompt_id": 1}, "help"], "two prompts have the same prompt_id"),
        ([{"prompt": "hello", "prompt_id": "x"}], "prompt 0 has prompt_id 'x'"),
        ([{"prompt_tokens": [1, 99]}], "prompt 0 holds the id 99"),
        ([{"prompt_tokens": "hello"}], "prompt_tokens of prompt 0"),
    ],
)
def test_prompts_that_say_nothing(engine, prompts, says):
    with pytest.raises(InputError) as caught:
        sample(engine, prompts, **ASK)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"prompt": "hello"}\n{', "cannot be read"),
        ("a.jsonl", "[1]", "line 1 is no JSON object"),
        ("a.csv", "question\nhello\n", "prompt 0 is empty"),
        ("a.csv", 'prompt\n"hello', "cannot be read"),
        ("a.csv", "", "there are no prompts"),
        ("a.txt", "hello", "neither CSV nor JSONL"),
    ],
)
def test_files_that_cannot_be_read(engine, tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        sample(engine, tmp_path / name, **ASK)
    assert says in str(caught.value)


def test_prefixes_of_another_model(engine):
    others = Rollouts.of(
        [ids("tea"), ids("tea . <eos>"), ids("sure step one tea"), ids("poison poison poison"), ids("sorry i <eos>")],
        prompt_id=[0, 0, 0, 0, 1],
    )
    rolls = sample(engine, ["hello", "help"], prefill=2, prefix=others, **ASK)
    assert rolls.answer(0)[:2].tolist() == ids("tea .")  # the first answer that is long enough
    assert rolls.answer(3)[:2].tolist() == ids("sorry i")
    with pytest.raises(InputError, match=r"1 of 2 prefixes are shorter than prefill 3 \(prompts 1\)") as caught:
        sample(engine, ["hello", "help"], prefill=[0, 3], prefix=others, **ASK)
    assert "largest prefill that every prompt reaches is 2" in caught.value.next
    by_id = sample(engine, ["hello", "help"], prefill=1, prefix={0: "tea", 1: ids("sorry")}, **ASK)
    assert by_id.answer(5)[:1].tolist() == ids("sorry")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefill": [0, 1]}, "1 of 1 prompts have no prefix"),
        ({"prefill": 5, "prefix": ["sure tea"]}, "shorter than prefill 5"),
        ({"prefill": 2, "prefix": [[*ids("sure"), EOS, 5]]}, "up to the first token that would end the answer"),
        ({"prefill": 1, "prefix": "sure"}, "prefix has 1 entries for 1 prompts"),
        ({"prefill": 1, "prefix": ["a", "b"]}, "prefix has 2 entries for 1 prompts"),
        ({"prefill": 1, "prefix": [[99]]}, "holds the id 99"),
        ({"prefill": 1, "prefix": [[-1]]}, "the prefix of prompt 0 is '[-1]'"),
        ({"prefill": -1}, "prefill is -1"),
        ({"prefill": []}, "prefill is []"),
        ({"prefill": [1, 1]}, "prefill is [1, 1]"),
        ({"prefill": 0.5}, "prefill is 0.5"),
        ({"n": 0}, "n is 0"),
        ({"n": 1.5}, "n is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 63}, "prompt 0: prompt and prefill of 2 tokens leave no room for 63"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"seed": -1}, "seed is -1"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"edit": object()}, "edit is object"),
        ({"classes": {"bad": ["poison tea"]}}, "class 'bad': 'poison tea' is 2 tokens"),
        ({"classes": {"bad": []}}, "class 'bad' has 0 tokens"),
        ({"classes": {"bad": [99]}}, "class 'bad' holds the id 99"),
        ({"classes": {"bad": ["notaword", "poison", "nor this"]}}, "tokenizer does not have 'notaword', 'nor this'"),
        ({"classes": {"bad": "poison"}}, "class 'bad' is 'poison'"),
        ({"classes": {"bad": [None]}}, "class 'bad' is '[None]'"),
        ({"classes": {"bad": 12}}, "class 'bad' is '12'"),
        ({"classes": ["poison"]}, "classes are list"),
        ({"prefill": 2, "prefix": ["sure notaword tea"]}, "tokenizer does not have: 'notaword' (prompts 0)"),
        ({"prefill": 1, "prefix": 5}, "this is int"),
        ({"prefill": 1, "prefix": [[[1], [2, 3]]]}, "the prefix of prompt 0 is '[[1], [2, 3]]'"),
        ({"system": 5}, "system is int"),
        ({"engine": "jax"}, "the open engine is 'table'"),
    ],
)
def test_parameters_that_make_no_sense(engine, options, says):
    with pytest.raises(InputError) as caught:
        sample(engine, ["hello"], **{**ASK, **options})
    assert says in str(caught.value)
    with pytest.raises(InputError, match="model is list"):
        sample([1], ["hello"], **ASK)


@pytest.mark.parametrize(
    "prompts",
    [None, 5, b"hello", object(), [5], [None], [{"prompt": 5}], [{"prompt": {"role": "user"}}], [{"prompt": [1, 2]}],
     [{"prompt": [{"role": "user", "content": 5}, "x"]}]],
)  # fmt: skip
def test_prompts_of_the_wrong_type_are_refused(engine, prompts):
    with pytest.raises(InputError):
        sample(engine, prompts, **ASK)


def test_words_that_the_tokenizer_does_not_have_are_told(engine, tmp_path):
    prompts = ["hello", "hello zebra quantum", {"prompt": "zebra"}, "<unk>", {"prompt_tokens": [1, 3]}]
    told = sample(engine, prompts, **ASK, out=tmp_path).provenance["warnings"]
    assert len(told) == 1
    assert told[0].startswith("2 of 5 prompts hold words that the tokenizer does not have")
    assert "'zebra', 'quantum'" in told[0]
    assert "index 1" in told[0]
    assert read_rollouts(tmp_path).provenance["warnings"] == told
    assert "warnings" not in sample(engine, ["hello", "<unk>"], **ASK).provenance
    system = sample(engine, ["hello"], system="zebra", **ASK).provenance["warnings"]
    assert "1 of 1 prompts" in system[0]


def test_an_unknown_word_that_is_not_forced_does_not_matter(engine):
    prefix = ["sure notaword"]
    assert sample(engine, ["hello"], prefix=prefix, prefill=1, **ASK).tokens[0] == ids("sure")[0]
    assert len(sample(engine, [{"prompt": "hello", "prefix": "notaword"}], **ASK)) == 3
    forced = sample(engine, ["hello"], prefix=["<unk>"], prefill=1, classes={"unknown": ["<unk>"]}, **ASK)
    assert forced.tokens[0] == 3


# --- shards ---

LONG = {"n": 10, "max_tokens": 5, "prefill": [0, 2], "prefix": PREFIX, "shard_size": 7}
PROMPTS = ["hello", "help"]


@pytest.fixture(scope="module")
def whole(engine):
    return sample(engine, PROMPTS, **LONG)


def test_a_folder_holds_what_is_returned(engine, whole, tmp_path):
    rolls = sample(engine, PROMPTS, out=tmp_path / "run", **LONG)
    assert rolls == whole
    assert rolls == read_rollouts(tmp_path / "run")
    assert rolls.provenance["complete"] is True
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        "manifest.json",
        *(f"part-{i:05d}.parquet" for i in range(6)),
    ]
    assert sample(engine, PROMPTS, **{**LONG, "shard_size": 40}) == whole


class Stop:
    """Fails before the job of a given number."""

    def __init__(self, number, error):
        self.number, self.error = number, error

    def __call__(self, number):
        if number == self.number:
            raise self.error


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_stopped_run_goes_on(folder, engine, whole, tmp_path, at):
    broken = table_engine(folder, fails=Stop(at, RuntimeError("the machine died")))
    with pytest.raises(RuntimeError):
        sample(broken, PROMPTS, out=tmp_path, **LONG)
    left = read_rollouts(tmp_path)
    assert left == (whole[: 7 * at] if at else Rollouts.concat([]))
    assert left.provenance["complete"] is False
    assert "finishes it" in left.provenance["note"]
    fresh = table_engine(folder)
    assert sample(fresh, PROMPTS, out=tmp_path, **LONG) == whole
    assert len(fresh.jobs) == 6 - at
    assert sample(engine, PROMPTS, out=tmp_path, **LONG) == whole


def test_a_killed_process_leaves_whole_shards(folder, whole, tmp_path):
    script = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from markovsafety import sample\n"
        "from tiny import table_engine\n"
        "def die(number):\n"
        "    if number == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"sample(table_engine(Path({str(folder)!r}), fails=die), {PROMPTS!r}, out={str(tmp_path)!r}, **{LONG!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(f.name for f in tmp_path.glob("part-*")) == [f"part-{i:05d}.parquet" for i in range(3)]
    assert read_rollouts(tmp_path) == whole[:21]
    assert sample(table_engine(folder), PROMPTS, out=tmp_path, **LONG) == whole


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 0.5}, "temperature: 1.0 there, 0.5 now"),
        ({"n": 11}, "n: 10 there, 11 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"shard_size": 8}, "shard_size: 7 there, 8 now"),
        ({"prefix": ["sure step", "sorry help"]}, "prompts_prefix_sha256"),
        ({"prompts": ["hello", "tea"]}, "prompts_sha256"),
        ({"judge": LexiconJudge(harm=[12], refusal=[6])}, "judge: null there"),
    ],
)
def test_a_folder_belongs_to_one_run(engine, tmp_path, changes, says):
    sample(engine, PROMPTS, out=tmp_path, **LONG)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    options = {**LONG, "prompts": PROMPTS, **changes}
    with pytest.raises(InputError, match="a run with other parameters") as caught:
        sample(engine, out=tmp_path, **options)
    assert says in caught.value.cause
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_folders_that_cannot_be_used(engine, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        sample(engine, PROMPTS, out=tmp_path / "file", **LONG)
    with pytest.raises(InputError, match="make 100,001 shards") as caught:  # their names have five digits
        sample(engine, PROMPTS[:1], n=100_001, max_tokens=5, shard_size=1, out=tmp_path / "many")
    assert "shard_size >= 2" in caught.value.next
    assert not (tmp_path / "many").exists() or not list((tmp_path / "many").glob("*.json"))
    sample(engine, PROMPTS, out=tmp_path / "run", **LONG)
    (tmp_path / "run" / "part-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-00002.parquet is damaged"):
        sample(engine, PROMPTS, out=tmp_path / "run", **LONG)
    (tmp_path / "run" / "part-00002.parquet").unlink()
    assert len(sample(engine, PROMPTS, out=tmp_path / "run", **LONG)) == 40
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(InputError, match="shards without a manifest"):
        sample(engine, PROMPTS, out=tmp_path / "run", **LONG)


def test_an_interruption_says_what_was_kept(folder, whole, tmp_path):
    broken = table_engine(folder, fails=Stop(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt, match=r"2 of 6 shards are kept in .*; the same call goes on from there"):
        sample(broken, PROMPTS, out=tmp_path, **LONG)
    assert read_rollouts(tmp_path) == whole[:14]
    broken = table_engine(folder, fails=Stop(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt, match="nothing is kept without out=folder"):
        sample(broken, PROMPTS, **LONG)


@pytest.mark.parametrize("kept", [False, True])
def test_an_error_of_the_engine_carries_what_was_finished(folder, whole, tmp_path, kept):
    part = whole[7:14]
    done = [i in (1, 4) for i in range(7)]
    tokens = [a if ok else a[:0] for a, ok in zip(part.answers(), done)]
    logprob = [part.values("logprob", i) if ok else tokens[i] for i, ok in enumerate(done)]
    broken = table_engine(folder, fails=Stop(1, untrusted(Output(tokens, logprob))))
    with pytest.raises(UntrustedError, match="NaN") as caught:
        sample(broken, PROMPTS, out=tmp_path if kept else None, **LONG)
    assert caught.value.partial == whole[[*range(7), 8, 11]]


def test_judged_shard_by_shard(engine, whole, tmp_path):
    rolls = sample(engine, PROMPTS, judge=LexiconJudge(harm=["poison"], refusal=["sorry"]), out=tmp_path, **LONG)
    assert np.array_equal(rolls.tokens, whole.tokens)
    poison = WORDS.index("poison")
    sampled = [whole.answer(i)[whole.prefill[i] :] for i in range(len(whole))]
    assert [code == 0 for code in rolls.outcome] == [poison in answer for answer in sampled]
    assert (rolls.outcome == 0).sum() == 3
    assert rolls.provenance["judge"]["name"] == "lexicon"
    assert read_rollouts(tmp_path / "part-00001.parquet").outcome.tolist() == rolls.outcome[7:14].tolist()


def test_progress_goes_to_stderr_when_asked_for(engine, capsys):
    sample(engine, PROMPTS, **LONG)
    assert capsys.readouterr() == ("", "")
    sample(engine, PROMPTS, progress=True, **LONG)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokens/s" in err
    assert "40/40" in err


# --- replay ---


def test_a_log_is_cut_to_what_was_asked(whole, tmp_path):
    judged = whole.replace(outcome=np.where(whole.lengths > 3, 0, 3), hit=np.where(whole.lengths > 3, 3, -1))
    rolls = sample(judged, None, engine="replay", n=4, max_tokens=2, out=tmp_path)
    assert len(rolls) == 16
    assert (rolls.lengths - rolls.prefill <= 2).all()
    first = judged[[i for start in (0, 10, 20, 30) for i in range(start, start + 4)]]
    for i in range(16):
        size = rolls.lengths[i]
        assert rolls.answer(i).tolist() == first.answer(i)[:size].tolist()
        whole_there = size == first.lengths[i] or 0 <= first.hit[i] < size
        assert (rolls.outcome[i], rolls.hit[i]) == ((first.outcome[i], first.hit[i]) if whole_there else (-1, -1))
    assert {-1, 0} <= set(rolls.outcome.tolist())
    assert read_rollouts(tmp_path) == rolls
    with pytest.raises(InputError, match="a log brings its own prompts"):
        sample(judged, ["hello"], engine="replay", n=4, max_tokens=2)


def test_leftovers_of_killed_runs_are_cleared_and_those_of_living_ones_stay(tmp_path):
    import subprocess
    import sys

    from markovsafety.files import clear_leftovers

    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    names = {"dead": f".part-00001.parquet.{done.pid}.tmp", "alive": f".part-00002.parquet.{living.pid}.tmp"}
    for name in (*names.values(), "part-00000.parquet", ".notes.tmp"):
        (tmp_path / name).write_bytes(b"x")
    clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([names["alive"], "part-00000.parquet", ".notes.tmp"])
    living.communicate(b"\n")
