"""Engine server when things go wrong: faults that pass, faults that stay, runs that stop halfway, and the key."""

from __future__ import annotations

import json
import socket
from collections import Counter

import numpy as np
import pytest
from fake_server import Fake, failing
from test_server_engine import PROMPTS, folder, law, template  # noqa: F401  fixtures

import markovsafety as ms
from markovsafety import InputError, ModelError, UntrustedError
from markovsafety.cli import main
from markovsafety.rollouts.engines import server_client

KEY = "sk-very-secret-0123456789"


def sampled(fake, **options):
    told = {"n": 8, "max_tokens": 12, "progress": False, "retries": 2, "timeout": 30}
    return ms.sample(fake.url, PROMPTS, **{**told, **options})


def answers_only(reply):
    """The fault for requests of answers; those by which the client gets to know the server go well."""
    return lambda number, body: reply(number, body) if body["max_tokens"] > 1 else None


def half(number, body):
    return 200, {}, b'{"id": "cmpl-1", "choices": [{"index": 0, "te'


def few(number, body):
    return 200, {}, json.dumps({"id": "cmpl-1", "choices": []}).encode()


def listed(number, body):
    return 200, {}, b"[]"


def aborted(number, body):
    return 200, {}, json.dumps({"choices": [{"text": "", "token_ids": [], "finish_reason": "abort"}]}).encode()


PASSING = {
    "429": lambda number, body: failing(429, "slow down"),
    "500": lambda number, body: failing(500),
    "503": lambda number, body: failing(503, "loading"),
    "half a JSON": half,
    "no choice": few,
    "a list": listed,
    "aborted": aborted,
}


@pytest.mark.parametrize("kind", PASSING)
def test_faults_that_pass_change_nothing(template, kind, monkeypatch):  # noqa: F811
    """Every request fails the first time, whatever way, and the rollouts are those of a server without faults."""
    monkeypatch.setattr(server_client, "FIRST_WAIT", 1e-3)
    seen = set()

    def once(number, body):
        new = body["seed"] not in seen
        seen.add(body["seed"])
        return PASSING[kind](number, body) if new else None

    with Fake(law, template) as sound, Fake(law, template, faults=answers_only(once)) as fake:
        assert sampled(fake, concurrency=1) == sampled(sound)
        assert len(fake.asked) == 32


@pytest.mark.parametrize(
    ("kind", "says", "next"),
    [
        ("429", "refuses the request \\(HTTP 429\\)", "lower concurrency"),
        ("500", "fails \\(HTTP 500\\), after 3 tries", "log"),
        ("half a JSON", "gave broken answers", "cut answers"),
        ("no choice", "gave broken answers", "log"),
    ],
)
def test_faults_that_stay_end_the_run_after_all_retries(template, kind, says, next, monkeypatch):  # noqa: F811
    monkeypatch.setattr(server_client, "FIRST_WAIT", 1e-3)
    with Fake(law, template, faults=answers_only(PASSING[kind])) as fake:
        with pytest.raises(ModelError, match=says) as caught:
            sampled(fake, concurrency=2)
        tried = Counter(body["seed"] for body in fake.asked)
    assert next in caught.value.next
    assert len(caught.value.partial) == 0
    assert max(tried.values()) == 3
    assert 4 <= len(tried) < 16  # four failures in a row, and those under way: not all that there are


@pytest.mark.parametrize(
    ("status", "next"), [(401, "MARKOVSAFETY_API_KEY"), (403, "MARKOVSAFETY_API_KEY"), (404, "/v1")]
)
def test_what_trying_again_cannot_cure_is_not_tried_again(template, status, next):  # noqa: F811
    with Fake(law, template, faults=answers_only(lambda number, body: failing(status, "no"))) as fake:
        with pytest.raises(ModelError, match=f"refuses the request \\(HTTP {status}\\)") as caught:
            sampled(fake, concurrency=1)
        tried = Counter(body["seed"] for body in fake.asked)
    assert max(tried.values()) == 1
    assert len(tried) < 16  # one, and those that the thread had begun meanwhile: not all that there are
    assert next in caught.value.next
    assert "it says: no" in caught.value.cause


def test_a_server_that_wants_a_long_pause_is_taken_at_its_word(template):  # noqa: F811
    busy = {"retry-after": "3600", "retry-after-ms": "3600000"}
    with Fake(law, template, faults=answers_only(lambda number, body: failing(429, **busy))) as fake:
        with pytest.raises(ModelError, match="HTTP 429"):
            sampled(fake, concurrency=1)
        tried = Counter(body["seed"] for body in fake.asked)
    assert max(tried.values()) == 1
    assert len(tried) < 16  # four failures in a row, the thread perhaps some ahead


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ModelError, match="cannot be reached") as caught:
        ms.sample(f"http://127.0.0.1:{port}/v1", PROMPTS, n=1, max_tokens=2, retries=0)
    assert "start it" in caught.value.next


def test_a_server_that_hangs(template):  # noqa: F811
    with Fake(law, template) as fake:

        def hang(number, body):
            fake.closed.wait(30)
            return failing(500)

        fake.faults = answers_only(hang)
        with pytest.raises(ModelError, match=r"no answer within 0.2 s, at the first try") as caught:
            sampled(fake, timeout=0.2, retries=0, concurrency=2)
        fake.closed.set()
    assert "raise timeout" in caught.value.next


def test_some_rollouts_without_an_answer_are_no_sample(template, tmp_path):  # noqa: F811
    """The others come with the error; shards that are whole stay, and the same call goes on to the same rollouts."""
    with Fake(law, template) as sound:
        whole = sampled(sound, shard_size=4, concurrency=1)
        lost = sound.asked[9]["seed"]
    bad = answers_only(lambda number, body: failing(500) if body["seed"] == lost else None)
    with Fake(law, template, faults=bad) as fake:
        with pytest.raises(UntrustedError, match=r"1 of 4 rollouts got no answer: .*HTTP 500") as caught:
            sampled(fake, shard_size=4, out=tmp_path / "run", concurrency=1)
        assert caught.value.exit_code == 1
        assert "no fair sample" in caught.value.cause
        partial = caught.value.partial
        assert len(partial) == 11
        rows = np.delete(np.arange(12), 9)
        assert partial == whole[rows]
        assert len(list((tmp_path / "run").glob("part-*.parquet"))) == 2
        fake.faults = lambda number, body: None
        before = len(fake.asked)
        again = sampled(fake, shard_size=4, out=tmp_path / "run")
        assert len(fake.asked) - before == 8
    assert again == whole
    assert ms.read_rollouts(tmp_path / "run") == whole


def test_another_server_of_the_same_model_goes_on(template, tmp_path):  # noqa: F811
    """The address is no part of a run: on a cluster it changes with every job. What the server offers is."""
    with Fake(law, template) as first:
        whole = sampled(first, out=tmp_path / "run", shard_size=4)
    (tmp_path / "run" / "part-00001.parquet").unlink()
    with Fake(law, template) as second:
        assert sampled(second, out=tmp_path / "run", shard_size=4) == whole
        assert len(second.asked) == 4
    with Fake(law, template, name="other") as other, pytest.raises(InputError, match="other parameters"):
        sampled(other, out=tmp_path / "run", shard_size=4)


@pytest.mark.parametrize("name", ["MARKOVSAFETY_API_KEY", "OPENAI_API_KEY"])
def test_the_key_is_sent_and_written_nowhere(template, tmp_path, monkeypatch, capsys, name):  # noqa: F811
    for other in server_client.KEYS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, KEY)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(json.dumps(p) for p in PROMPTS))
    with Fake(law, template) as fake:
        words = ["sample", fake.url, str(prompts), "--n", "4", "--max-tokens", "5", "--retries", "0", "--out"]
        assert main([*words, str(tmp_path / "a"), "--json"]) == 0
        assert set(fake.keys) == {f"Bearer {KEY}"}
        # A server that repeats the key in its refusal.
        fake.faults = answers_only(lambda number, body: failing(401, f"the key {KEY} is wrong"))
        assert main([*words, str(tmp_path / "b"), "--json"]) == 2
        assert main([*words, str(tmp_path / "b"), "--debug"]) == 2
        rolls = sampled_provenance(fake)
    told = capsys.readouterr()
    assert "the key *** is wrong" in told.out
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert "Traceback" in told.err
    assert KEY not in told.out + told.err + rolls
    assert KEY.encode() not in written
    assert (tmp_path / "a" / "manifest.json").is_file()


def sampled_provenance(fake):
    fake.faults = lambda number, body: None
    rolls = sampled(fake)
    return json.dumps(rolls.provenance) + repr(ms.rollouts.engines.open_engine("server", fake.url))


def test_the_first_key_that_is_set_counts_and_an_empty_one_is_none(template, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MARKOVSAFETY_API_KEY", "")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Fake(law, template) as fake:
        sampled(fake)
        assert KEY not in str(fake.keys)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hush-hush@127.0.0.1:8000/v1",
        "http://127.0.0.1:8000/v1?key=hush-hush",
        "http://hush-hush@127.0.0.1:port/v1",
        "http://",
        "https://:80/v1",
    ],
)
def test_addresses_that_are_none_or_hold_a_secret(url):
    with pytest.raises(InputError) as caught:
        ms.sample(url, PROMPTS, n=1, max_tokens=2)
    assert "hush-hush" not in str(caught.value)
    assert ("MARKOVSAFETY_API_KEY" in caught.value.next) == ("hush-hush" in url)


def test_a_server_that_lists_no_models_is_asked_by_name(template, folder, monkeypatch):  # noqa: F811
    with Fake(law, template) as fake:
        monkeypatch.setattr(fake, "models", lambda: failing(500, "no cache"))
        with pytest.raises(ModelError, match="HTTP 500") as caught:
            sampled(fake)
        assert "served=" in caught.value.next
        assert len(sampled(fake, served="organism", tokenizer=folder)) == 16
