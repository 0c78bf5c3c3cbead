"""Engine server against a real server: ``transformers serve`` with the shipped organism, all that it offers.

It takes and gives text only and no log-probabilities (what it offers is asserted whole, so that a version which offers
more is noticed here); what servers offer beyond that is tested against the fake of ``fake_server.py``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

import markovsafety as ms
from markovsafety import ModelError
from markovsafety.organism import model_path, prompts
from markovsafety.outcomes import OUTCOMES
from markovsafety.rollouts.engines import open_engine

pytest.importorskip("uvicorn", reason="transformers serve needs transformers[serving]")

MODEL = str(model_path("shallow"))
PROMPTS = [p for p in prompts(n=48, seed=4) if p["category"] in ("bio", "chem")]  # harm comes about every third time
FALSE_ALARM = 1e-7
"""Of the whole comparison of laws."""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server in its own process, from a free port until the end of this file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("serve")
    (home / "hub").mkdir()
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", MODEL, "--host", "127.0.0.1"]
    words += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    alone = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(home / "hub"), "OMP_NUM_THREADS": "1"}
    with open(home / "log", "wb") as log:
        server = subprocess.Popen(words, env={**os.environ, **alone}, stdout=log, stderr=log)
    try:
        for _ in range(6000):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def served(url, **options):
    told = {"n": 1, "max_tokens": 24, "served": MODEL, "retokenize": True, "progress": False, "concurrency": 4}
    return ms.sample(url, PROMPTS, **{**told, **options})


def test_what_it_offers(url):
    offers = open_engine("auto", url, served=MODEL, retokenize=True).offers.told()
    text = {"prompt": "text", "output": "text", "style": "generation_config"}
    assert offers == {**text, "logprob": "none", "checked": True}
    with pytest.raises(ModelError, match="gives no token ids"):
        open_engine("server", url, served=MODEL)
    with pytest.raises(ModelError, match="HTTP 400") as caught:
        open_engine("server", url, served="somebody/else", tokenizer=MODEL)
    assert "Server is pinned to" in caught.value.cause
    with pytest.raises(ms.InputError, match="lists 0 models"):
        open_engine("server", url)


def test_the_likeliest_answers_are_those_of_the_model_at_hand(url):
    """Prompts, prefills and ends of sequence survive the way through text, token for token."""
    there = served(url, temperature=0, prefill=[0, 3])
    here = ms.sample(MODEL, PROMPTS, n=1, max_tokens=24, temperature=0, prefill=[0, 3], engine="transformers")
    assert np.array_equal(there.tokens, here.tokens)
    assert np.array_equal(there.offsets, here.offsets)
    assert np.isnan(there.columns["logprob"]).all()


def test_harm_comes_as_often_as_from_the_model_at_hand(url):
    """Hoeffding for the difference of two means over the same prompts, for every outcome together."""
    told = {"prefill": [0, 8], "max_tokens": 20}
    there = served(url, n=11, seed=1, **told)
    here = ms.sample(MODEL, PROMPTS, n=60, seed=2, engine="transformers", progress=False, **told)
    seen = [np.bincount(ms.judge(r, "organism").outcome, minlength=len(OUTCOMES)) / len(r) for r in (there, here)]
    allowed = np.sqrt(np.log(2 * len(OUTCOMES) / FALSE_ALARM) * (1 / len(there) + 1 / len(here)) / 2)
    assert allowed < 0.18
    assert allowed < seen[1][OUTCOMES.index("harm")] < 1 - allowed
    assert (np.abs(seen[0] - seen[1]) <= allowed).all(), (seen, allowed)


def test_its_seed_is_heard_one_request_at_a_time(url):
    one, again = (served(url, concurrency=1, max_tokens=8, seed=5) for _ in range(2))
    assert one == again
    assert one != served(url, concurrency=1, max_tokens=8, seed=6)


def test_the_run_is_described(url, tmp_path):
    served(url, max_tokens=4, out=tmp_path / "run")
    told = json.loads((tmp_path / "run" / "manifest.json").read_text())["provenance"]
    assert told["model"] == {"name": MODEL, "path": MODEL, "weights": None}
    assert told["engine"]["url"] == url
    assert told["engine"]["reproducible"].startswith("no")
    assert "made from the server's text" in told["warnings"][0]
