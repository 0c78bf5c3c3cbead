"""The API key: sent in a header, and written nowhere, whatever a server repeats of it."""

from __future__ import annotations

import json
import logging
import traceback
from contextlib import suppress

import pytest
from fake_server import Fake, failing
from test_server_engine import PROMPTS, folder, law, template  # noqa: F401  fixtures

import markovsafety as ms
from markovsafety import InputError, MarkovsafetyError, ModelError
from markovsafety.rollouts.engines import open_engine, server_client
from markovsafety.rollouts.engines.server_key import KEYS, LIBRARIES, Key, Withheld

KEY = "sk-'very\\secret/0123456789"
"""With letters that texts of errors, JSON and addresses write in other ways."""
FORMS = {KEY, repr(KEY)[1:-1], json.dumps(KEY)[1:-1], "sk-%27very%5Csecret%2F0123456789"}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEYS[0], KEY)
    monkeypatch.delenv(KEYS[1], raising=False)
    monkeypatch.setattr(server_client, "FIRST_WAIT", 1e-3)


@pytest.fixture
def logged():
    """Everything that anybody logs, as it would be written to a file."""
    lines = []

    class Kept(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    handler, root = Kept(), logging.getLogger()
    handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
    levels = {name: logging.getLogger(name).level for name in ("", *LIBRARIES)}
    root.addHandler(handler)
    for name in levels:
        logging.getLogger(name or None).setLevel(logging.DEBUG)
    yield lines
    root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)


def clean(*texts):
    """Nothing holds the key, in whatever form; all of it counts as one text."""
    whole = "\n".join(texts)
    return not any(form in whole for form in FORMS)


def places(value, at=()):
    """Where there is a value in a JSON document: every path to it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    yield from (path for name, item in inside for path in places(item, (*at, name)))
    if at:
        yield at


def put(value, at, what):
    """The document with something else in that place."""
    value = json.loads(json.dumps(value))
    inner = value
    for name in at[:-1]:
        inner = inner[name]
    inner[at[-1]] = what
    return value


def ways():
    """How the key may stand in a place."""
    return [f"Bearer {KEY} is wrong", {KEY: [KEY]}]


def run(fake, out, tokenizer=None, **options):
    """Sample into a folder; everything that can be read of it or of the error, as text."""
    told = {"n": 2, "max_tokens": 4, "progress": False, "retries": 0, "timeout": 30, "concurrency": 1, "out": out}
    try:
        rolls = ms.sample(fake.url, PROMPTS[:1], tokenizer=tokenizer, **{**told, **options})
    except MarkovsafetyError as error:
        traced = "".join(traceback.format_exception(error))
        partial = error.partial.provenance if hasattr(error.partial, "provenance") else error.partial
        return f"{error} {error!r} {traced} {partial!r} {vars(error)}"
    files = [file for file in out.rglob("*") if file.is_file()]
    assert any(file.suffix == ".parquet" for file in files)
    return f"{rolls!r} {rolls.provenance}" + "".join(file.read_bytes().decode("latin-1") for file in files)


@pytest.mark.parametrize("poor", [False, True], ids=["ids", "text"])
def test_a_server_that_repeats_the_key_in_any_field_of_an_answer(template, tmp_path, logged, capfd, poor):  # noqa: F811
    """In each field for itself: either there are rollouts, or an error of ours; the key is in neither."""
    kind = {"ids": "text", "logprobs": None} if poor else {}
    seen, failures = [], 0
    with Fake(law, template, **kind) as fake:
        example = fake.answer({"prompt": [4, 5], "max_tokens": 2, "logprobs": 1, "return_token_ids": True})
        spots = list(places(example))
        assert ("choices", 0, "stop_reason") in spots
        for i, at in enumerate(spots):
            for j, what in enumerate(ways()):
                fake.changed = lambda reply, at=at, what=what: put_where_it_goes(reply, at, what)
                seen.append(run(fake, tmp_path / f"{i}-{j}", retokenize=poor))
                failures += not (tmp_path / f"{i}-{j}").exists()
    told = capfd.readouterr()
    assert 0 < failures < 2 * len(spots)
    assert clean(*seen, *logged, told.out, told.err)
    assert any("answers with the API key" in text for text in seen) == poor


def put_where_it_goes(reply, at, what):
    with suppress(KeyError, IndexError, TypeError):  # an answer of one token less
        return put(reply, at, what)
    return reply


def test_a_server_that_repeats_the_key_in_its_list_of_models(template, folder, tmp_path, logged):  # noqa: F811
    seen = []
    with Fake(law, template) as fake:
        (card,) = json.loads(fake.models()[2])["data"]
        for i, name in enumerate([*card, KEY]):
            for j, what in enumerate(ways()):
                fake.cards = [{**card, name: what}]
                for given in (None, folder):
                    seen.append(run(fake, tmp_path / f"{i}-{j}-{given is None}", given))
    assert clean(*seen, *logged)


def test_a_model_that_is_named_by_the_key_is_still_asked_by_its_name(template, folder, tmp_path):  # noqa: F811
    with Fake(law, template, name=f"org/{KEY}-tuned") as fake:
        for i, served in enumerate((None, fake.name)):
            told = run(fake, tmp_path / f"{i}", folder, served=served)
            assert clean(told)
            assert "org/***-tuned" in told
        engine = open_engine("server", fake.url, tokenizer=folder)
        assert {body["model"] for body in fake.asked} == {fake.name}
    assert clean(repr(engine), json.dumps(engine.describe()))


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 503])
def test_a_server_that_repeats_the_key_in_its_errors(template, tmp_path, logged, status):  # noqa: F811
    """In JSON, text or HTML, in headers, in the place where others give a reason."""
    replies = [
        failing(status, f"the key {KEY} is wrong", **{"x-key": KEY, "retry-after": KEY, "location": KEY}),
        (status, {"retry-after-ms": "1", "set-cookie": KEY}, f"<html>{KEY}</html>".encode()),
        (status, {"retry-after-ms": "1", "content-type": f"text/{KEY}"}, json.dumps({"detail": [{KEY: KEY}]}).encode()),
        (status, {"retry-after-ms": "1"}, json.dumps({"error": {"message": {"is": KEY}, KEY: KEY}}).encode()),
        (status, {"retry-after-ms": "1", f"x-{KEY[3:7]}": KEY}, json.dumps(f"a {KEY}").encode()),
        (200, {}, f'{{"choices": "{KEY}'.encode()),
        (200, {}, json.dumps([KEY]).encode()),
        (200, {"content-encoding": "gzip"}, KEY.encode()),
    ]
    seen = []
    with Fake(law, template) as fake:
        for i, reply in enumerate(replies):
            for most in (0, 1):  # while the client gets to know the server, and later
                fake.faults = lambda number, body, most=most, reply=reply: reply if body["max_tokens"] > most else None
                seen.append(run(fake, tmp_path / f"{i}-{most}"))
    assert clean(*seen, *logged)
    assert any("***" in text for text in seen)
    assert any(line.startswith("httpcore") for line in logged)
    assert any("***" in line for line in logged)


@pytest.mark.parametrize(
    "value", ["two words", "line\nbreak", "Schlüssel", "tab\t0123456789", "nul\x0000000"[:3] + "\x7f"]
)
def test_a_key_that_no_header_can_hold_is_refused_unread(template, monkeypatch, value):  # noqa: F811
    monkeypatch.setenv(KEYS[0], value)
    with Fake(law, template) as fake, pytest.raises(InputError, match="API key in MARKOVSAFETY_API_KEY") as caught:
        open_engine("server", fake.url)
    assert value not in "".join(traceback.format_exception(caught.value))
    assert not fake.keys


def test_blanks_around_the_key_are_no_part_of_it(template, monkeypatch):  # noqa: F811
    monkeypatch.setenv(KEYS[0], f" {KEY}\n")
    with Fake(law, template) as fake:
        open_engine("server", fake.url)
        assert set(fake.keys) == {f"Bearer {KEY}"}


def test_an_address_that_holds_the_key_is_refused():
    with pytest.raises(InputError, match="or the API key") as caught:
        open_engine("server", f"http://127.0.0.1:1/{KEY}/v1")
    assert clean(str(caught.value))


def test_a_word_that_stands_for_no_key_is_looked_for_nowhere(template, tmp_path, monkeypatch):  # noqa: F811
    """Servers without keys are often given "EMPTY" or "none"; nothing changes for a model whose name holds that."""
    monkeypatch.setenv(KEYS[0], "none")
    with Fake(law, template, name="none-the-less") as fake:
        assert "none-the-less" in run(fake, tmp_path / "out")
    assert Key("none").hide(["none"]) == ["none"]


def test_hiding():
    key = Key(KEY)
    found = key.hide({"a": [f"x{KEY}", 1, None, {KEY: True}], "b": "plain"})
    assert found == {"a": ["x***", 1, None, {"***": True}], "b": "plain"}
    assert isinstance(found["a"][0], Withheld)
    assert type(found["b"]) is str
    assert all(clean(key.hide(form)) for form in FORMS)
    assert key.shown(key.hide(f"m-{KEY}")) == f"m-{KEY}"
    assert Key("none").shown("m-***") == "m-***"  # nothing of it was hidden
    assert clean(repr(key))


def test_text_of_an_answer_is_not_changed_but_refused(template, tmp_path):  # noqa: F811
    """A rollout with stars in the place of words would be one that no model gave."""
    with Fake(law, template, ids="text", logprobs=None) as fake:
        fake.changed = lambda reply: put(reply, ("choices", 0, "text"), f"my key is {KEY}")
        with pytest.raises(ModelError, match="answers with the API key") as caught:
            ms.sample(fake.url, PROMPTS, n=1, max_tokens=4, retokenize=True, retries=0, out=tmp_path / "out")
    assert clean(str(caught.value))
