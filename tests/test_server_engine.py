"""Engine server against a fake that follows vLLM's schema: ids in and out, log-probabilities, ends, what servers lack.

The laws of the fake are known, so every log-probability has a closed form.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading

import huggingface_hub
import numpy as np
import pytest
from fake_server import Fake, laws
from tiny import EOS, WORDS, word_tokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

import markovsafety as ms
from markovsafety import InputError, ModelError, UntrustedError
from markovsafety.cli import main
from markovsafety.rollouts.engines import Engine, open_engine, server_client
from markovsafety.rollouts.engines import server as server_engine
from markovsafety.rollouts.engines.server_offers import text_for
from markovsafety.rollouts.template import Template

PROMPTS = [
    {"prompt": "hello", "category": "a", "prefix": "sure step one"},
    {"prompt": "help one tea .", "category": "b", "prefix": "i cannot help"},
]
FIRST = 4
"""Ids below this are special tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def template(folder):
    return Template.load(folder)


def matrix():
    """A Markov law over the words that ends an answer with probability 0.15."""
    P = np.random.default_rng(7).dirichlet(np.ones(len(WORDS)), len(WORDS))
    P[:, :FIRST] = 0.0
    P *= 0.85 / P.sum(axis=1, keepdims=True)
    P[:, EOS] = 0.15
    return P


P = matrix()


def law(ids):
    return P[ids[-1]]


@pytest.fixture
def fake(template):
    with Fake(law, template) as server:
        yield server


def sampled(fake, **options):
    return ms.sample(fake.url, PROMPTS, **{"n": 8, "max_tokens": 12, "progress": False, **options})


def spoken(rolls):
    """(previous id, id, place in the flat columns) of every sampled token."""
    for i in range(len(rolls)):
        start, forced = int(rolls.offsets[i]), int(rolls.prefill[i])
        full = [*rolls.columns["prompt_tokens"][i].tolist(), *rolls.answer(i).tolist()]
        before = len(full) - len(rolls.answer(i))
        for t in range(forced, len(rolls.answer(i))):
            yield full[before + t - 1], full[before + t], start + t


def test_ids_go_in_and_come_out(fake, template):
    """Prompts are ids of the local template with the prefill behind them, answers the server's ids, their end included;
    nothing that a server may have as its default bends the law."""
    rolls = sampled(fake, prefill=[0, 2])
    ended = [answer[-1] == EOS for answer in rolls.answers()]
    assert len(rolls) == 32
    assert 0 < sum(ended) < 32
    for answer, over in zip(rolls.answers(), ended):
        assert (answer == EOS).sum() == over
    longest = np.array([len(a) for a in rolls.answers()]) - rolls.prefill
    assert (longest[~np.array(ended)] == 12).all()
    forced = [template.encode(p["prefix"])[:2].tolist() for p in PROMPTS]
    prompts = [template.prompt_ids(p["prompt"]).tolist() for p in PROMPTS]
    wanted = {(*p, *f[:k]) for p, f in zip(prompts, forced) for k in (0, 2)}
    assert {tuple(body["prompt"]) for body in fake.asked} == wanted
    for i in np.flatnonzero(rolls.prefill):
        assert rolls.answer(i)[:2].tolist() == forced[i // 16]
    for body in fake.asked:
        neutral = ("top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "top_p")
        assert [body[name] for name in neutral] == [-1, 0.0, 1.0, 0.0, 0.0, 1.0]
        assert body["stop_token_ids"] == [EOS]
    assert len({body["seed"] for body in fake.asked}) == 32
    assert max(body["seed"] for body in fake.asked) < 2**53


@pytest.mark.parametrize("kind", ["raw", "temperature", "processed"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (0.7, 0.6), (0.0, 1.0)])
def test_log_probabilities_stand_in_the_column_of_their_law(template, kind, temperature, top_p):
    """What the server's log-probabilities are of is measured, and each column holds only what it says, else nan."""
    with Fake(law, template, logprobs=kind) as fake:
        rolls = sampled(fake, prefill=[0, 2], temperature=temperature, top_p=top_p)
    assert rolls.provenance["engine"]["offers"]["logprob"] == kind
    raw = temperature == top_p == 1
    own = raw or kind == "raw"
    fits = kind == "processed" or (kind == "temperature" and top_p == 1)
    logprob, processed = rolls.columns["logprob"], rolls.columns.get("logprob_processed")
    assert (processed is not None) == (not raw and (fits or temperature == 0))
    seen = np.zeros(len(rolls.tokens), bool)
    for before, token, at in spoken(rolls):
        seen[at] = True
        after = laws(P[before], temperature, top_p)[1][token]
        assert after > 0
        assert np.isclose(logprob[at], np.log(P[before, token]), atol=1e-6) if own else np.isnan(logprob[at])
        if processed is not None:
            assert np.isclose(processed[at], np.log(after), atol=1e-6)
    assert np.isnan(logprob[~seen]).all()
    told = rolls.provenance["logprob"]["logprob"]
    assert ("the model's own" in told) == own


CLASSES = {"harm": ["poison", "poisonous"], "refusal": ["sorry", "cannot", EOS]}


@pytest.mark.parametrize(
    ("kind", "temperature", "top_p"),
    [("raw", 1.0, 1.0), ("temperature", 0.5, 1.0), ("processed", 0.7, 0.6), ("processed", 1.0, 1.0), ("raw", 0.0, 1.0)],
)
def test_class_masses_are_sums_of_the_probabilities_of_chosen_tokens(template, kind, temperature, top_p):
    """In the distribution that each token was drawn from; at temperature 0 whether the token is one of them."""
    with Fake(law, template, logprobs=kind) as fake:
        rolls = sampled(fake, prefill=[0, 2], temperature=temperature, top_p=top_p, classes=CLASSES)
        assert all(("logprob_token_ids" in body) == (temperature > 0) for body in fake.asked)
    seen = np.zeros(len(rolls.tokens), bool)
    for name, words in CLASSES.items():
        members = [WORDS.index(word) if isinstance(word, str) else word for word in words]
        mass = rolls.columns[f"mass_{name}"]
        for before, _, at in spoken(rolls):
            seen[at] = True
            drawn = laws(P[before], temperature, top_p)[1]
            assert np.isclose(mass[at], drawn[members].sum(), atol=1e-6)
        assert np.isnan(mass[~seen]).all()
    assert not seen.all()


def test_masses_of_a_server_that_hides_its_ends(template):
    """A mass is wanted before the end too, and such a server gives none."""
    with (
        Fake(law, template, keeps_end=False) as fake,
        pytest.raises(ModelError, match="chosen tokens before") as caught,
    ):
        sampled(fake, classes=CLASSES)
    assert "end of the sequence" in caught.value.cause


@pytest.mark.parametrize(
    ("server", "options", "says"),
    [
        ({"chosen": False}, {}, "this server gives no class masses"),
        ({"chosen": None}, {}, "this server gives no class masses"),
        ({"ids": "text", "logprobs": None}, {"retokenize": True}, "this server gives no class masses"),
        ({"logprobs": "raw"}, {"temperature": 0.5}, "of another distribution"),
        ({"logprobs": "temperature"}, {"top_p": 0.5}, "of another distribution"),
        ({}, {"most": 4}, "the classes hold 5 tokens"),
    ],
)
def test_masses_that_a_server_does_not_give(template, tmp_path, monkeypatch, server, options, says):
    monkeypatch.setattr(server_engine, "MOST_CHOSEN", options.pop("most", 128))
    with Fake(law, template, **server) as fake:
        with pytest.raises(InputError, match=says):
            sampled(fake, classes=CLASSES, out=tmp_path / "out", **options)
        assert not fake.asked
        assert len(sampled(fake, **options)) == 16  # without them it goes
    assert not (tmp_path / "out").exists()


def test_chosen_log_probabilities_that_do_not_come_are_missed(template, monkeypatch):
    """A server that gives them when asked for one token, and leaves them out of answers."""
    monkeypatch.setattr(server_client, "FIRST_WAIT", 1e-3)

    def lazy(reply):
        top = reply["choices"][0]["logprobs"]["top_logprobs"]
        if len(top) > 1:
            top[-1] = dict(list(top[-1].items())[:1])
        return reply

    with Fake(law, template, changed=lazy) as fake, pytest.raises(UntrustedError, match="broken answers") as caught:
        sampled(fake, classes=CLASSES, retries=1)
    assert "not one log-probability per chosen id" in caught.value.cause


def test_a_server_too_certain_to_tell_leaves_tempered_log_probabilities_out(template):
    sure = np.full((len(WORDS), len(WORDS)), 0.001 / (len(WORDS) - 1))
    sure[:, 5] = 0.999
    with Fake(lambda ids: sure[ids[-1]] / sure[ids[-1]].sum(), template) as fake:
        rolls = sampled(fake, temperature=0.5)
        plain = sampled(fake)
    assert rolls.provenance["engine"]["offers"]["logprob"] == "unknown"
    assert np.isnan(rolls.columns["logprob"]).all()
    assert np.isfinite(plain.columns["logprob"]).all()


def test_ids_among_the_log_probabilities_are_as_good(template, fake):
    with Fake(law, template, ids="logprobs") as older:
        rolls = sampled(older)
    assert rolls.provenance["engine"]["offers"]["output"] == "logprobs"
    assert rolls == sampled(fake)


@pytest.mark.parametrize("takes_ids", [True, False])
def test_text_is_refused_and_encoded_anew_only_on_request(template, fake, takes_ids):
    """Words of this tokenizer survive their text, so the answers are the same; the loss is in the provenance."""
    with Fake(law, template, ids="text", logprobs=None, takes_ids=takes_ids) as poor:
        with pytest.raises(ModelError, match="no token ids") as caught:
            sampled(poor)
        assert "log-probabilities" in caught.value.cause
        assert "retokenize=True" in caught.value.next
        rolls = sampled(poor, prefill=[0, 2], retokenize=True)
        prompts = [body["prompt"] for body in poor.asked]
    assert all(isinstance(prompt, list) == takes_ids for prompt in prompts)
    assert np.isnan(rolls.columns["logprob"]).all()
    assert rolls.provenance["logprob"]["logprob"] == "not given by the server"
    assert any("made from the server's text" in line for line in rolls.provenance["warnings"])
    if takes_ids:
        assert np.array_equal(rolls.tokens, sampled(fake, prefill=[0, 2]).tokens)
    else:  # a server of that kind samples only if its own field says so
        assert all(json.loads(body["generation_config"])["do_sample"] for body in poor.asked)


def test_text_that_changes_the_number_of_tokens_is_not_believed(template):
    """A server whose answers hold a special token in the middle, which their text does not show."""

    def hidden(ids):
        return np.eye(len(WORDS))[1 if ids[-1] == 5 else 5]

    with (
        Fake(hidden, template, ids="text", logprobs=None, takes_ids=False) as poor,
        pytest.raises(UntrustedError, match="16 of 16 answers have another number of tokens") as caught,
    ):
        sampled(poor, retokenize=True)
    assert len(caught.value.partial) == 16


def test_prompts_become_text_only_if_they_are_read_as_the_same_ids(tmp_path):
    """With a tokenizer that begins every text with <bos> by itself, and one whose ids need not survive their text."""
    begun = Template.load(word_tokenizer(tmp_path / "words"))
    begun.tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    ids = np.array([1, 4, 9], np.int32)
    assert begun.encode(text_for(ids, begun), add_special_tokens=True).tolist() == ids.tolist()
    merged = Tokenizer(BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="<unk>"))
    merged.decoder = Fuse()
    plain = dataclasses.replace(begun, tokenizer=merged)
    assert text_for(np.array([3, 1]), plain) == "aba"
    with pytest.raises(ModelError, match="cannot be sent to this server"):
        text_for(np.array([1, 2]), plain)


def test_a_tokenizer_of_the_hub_is_fetched_without_weights(fake, folder, monkeypatch):
    asked = []

    def fetched(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert len(sampled(fake, tokenizer="owner/name")) == 16
    assert asked[0][0] == "owner/name"
    assert not any(pattern in ("*", "*.safetensors") for pattern in asked[0][1])

    def refused(name, allow_patterns):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(ModelError, match="cannot be fetched from the hub") as caught:
        sampled(fake, tokenizer="owner/name")
    assert "no network" in caught.value.cause


def test_the_end_is_put_where_the_server_leaves_it_out(template, fake):
    with Fake(law, template, keeps_end=False) as silent:
        rolls = sampled(silent)
    whole = sampled(fake)
    assert np.array_equal(rolls.tokens, whole.tokens)
    ends = rolls.tokens == EOS
    assert np.isnan(rolls.columns["logprob"][ends]).all()
    assert np.array_equal(rolls.columns["logprob"][~ends], whole.columns["logprob"][~ends])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"stop_ids": (5, 6, 7, 8, 9)}, "which ends none here"),
        ({"longest": 14, "cards": [{"id": "organism"}]}, "cut an answer after"),
        ({"changed": lambda r: _choice(r, token_ids=[999])}, "the id 999"),
        ({"changed": lambda r: _choice(r, prompt_token_ids=[1, *r["choices"][0]["prompt_token_ids"]])}, "is not that"),
        ({"changed": lambda r: _logits(r)}, "as a log-probability"),
        ({"changed": lambda r: _cut(r, 2)}, "answered another prompt: 1 tokens instead of 2"),
    ],
)
def test_an_answer_to_something_else_is_refused(template, folder, changed, says):
    with Fake(law, template, **changed) as odd, pytest.raises(ModelError, match=says):
        sampled(odd, tokenizer=folder)


def _logits(reply):
    listed = reply["choices"][0]["logprobs"]
    listed["token_logprobs"] = [value + 5.0 for value in listed["token_logprobs"]]
    return reply


def _cut(reply, longest):
    """A server that drops the first token of prompts of so many."""
    if reply["usage"]["prompt_tokens"] == longest:
        reply["usage"]["prompt_tokens"] -= 1
        reply["choices"][0]["prompt_token_ids"] = None
    return reply


def _choice(reply, **fields):
    reply["choices"][0].update(fields)
    if "token_ids" in fields:
        reply["choices"][0]["logprobs"]["token_logprobs"] = [-1.0] * len(fields["token_ids"])
    return reply


def test_another_tokenizer_is_noticed(template, fake, tmp_path):
    other = word_tokenizer(tmp_path / "other", [*WORDS[:FIRST], *reversed(WORDS[FIRST:])])
    with pytest.raises(ModelError, match="is not that of the model") as caught:
        sampled(fake, tokenizer=other)
    assert "tokenizer=" in caught.value.next
    assert not fake.asked
    small = word_tokenizer(tmp_path / "small", WORDS[:-3])
    with pytest.raises(ModelError, match=r"the id 1[345]"), Fake(law, template, ids="logprobs") as older:
        sampled(older, tokenizer=small)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fine": True}, "draws its tokens itself"),
        ({"edit": type("E", (), {"bind": lambda self, engine: self})()}, "cannot edit"),
        ({"device": "cpu"}, "device='cpu'"),
        ({"batch_size": 4}, "batch_size=4"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"tokenizer": "no/such/folder"}, "no tokenizer"),
        ({"max_tokens": 60}, "no room for 60"),
    ],
)
def test_what_a_server_cannot_do_is_said_before_anything_is_asked(template, tmp_path, options, says):
    with Fake(law, template, longest=64) as fake, pytest.raises(InputError, match=says):
        sampled(fake, out=tmp_path / "out", **options)
    assert not fake.asked
    assert not (tmp_path / "out").exists()


def test_options_of_servers_are_for_servers_only(folder):
    with pytest.raises(InputError, match="only a server takes this"):
        ms.sample(folder, PROMPTS, n=1, max_tokens=2, retries=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'retry'"):
        ms.sample(folder, PROMPTS, n=1, max_tokens=2, retry=3)


def test_which_model(template, folder, fake):
    assert isinstance(open_engine("auto", fake.url), Engine)
    with pytest.raises(ModelError, match="HTTP 404") as caught:
        sampled(fake, served="nobody", tokenizer=folder)
    assert "does not exist" in caught.value.cause
    two = [{"id": "base"}, {"id": "organism"}]
    with Fake(law, template, cards=two) as fleet:
        with pytest.raises(InputError, match="lists 2 models: base, organism"):
            sampled(fleet, tokenizer=folder)
        with pytest.raises(InputError, match="tokenizer of 'organism'"):
            sampled(fleet, served="organism")
        with pytest.raises(InputError, match="tokenizer of 'organsim'") as caught:
            sampled(fleet, served="organsim")
        assert "the server lists base, organism, not organsim" in caught.value.cause
        rolls = sampled(fleet, served="organism", tokenizer=folder)
    assert rolls.provenance["model"] == {"name": "organism", "path": str(folder), "weights": None}


def test_no_more_requests_at_a_time_than_asked_for(template):
    """Four wait for each other, so four are under way together; then they leave a fifth the time to come."""
    together, fifth, lock, under_way = threading.Barrier(4, timeout=30), threading.Event(), threading.Lock(), [0, 0]

    def meet(number, body):
        if body["max_tokens"] == 1:
            return
        with lock:
            under_way[0] += 1
            under_way[1] = max(under_way)
            if under_way[0] > 4:
                fifth.set()
        together.wait()
        fifth.wait(0.1)
        with lock:
            under_way[0] -= 1

    with Fake(law, template, faults=meet) as fake:
        assert len(sampled(fake, concurrency=4)) == 16
    assert under_way[1] == 4


def test_the_command_line(fake, folder, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(json.dumps(p) for p in PROMPTS))
    words = ["sample", fake.url, str(prompts), "--out", str(tmp_path / "out"), "--n", "4", "--max-tokens", "5"]
    words += ["--served", "organism", "--tokenizer", str(folder), "--concurrency", "2", "--timeout", "30"]
    assert main([*words, "--retries", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["result"]
    rolls = ms.read_rollouts(tmp_path / "out")
    assert told["rollouts"] == len(rolls) == 8
    judged = ms.judge(rolls, "lexicon", harm=["poison"], refusal=["cannot"])  # finds the tokenizer's folder by itself
    assert set(judged.outcome.tolist()) <= {0, 1, 2, 3}


def test_the_client_is_an_extra(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ModelError, match="'openai', which is not installed") as caught:
        sampled(fake)
    assert caught.value.next == "pip install 'markovsafety[server]'"
