"""Labelled pairs of a prompt and its answer, for the tests of the teacher and of its filter."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import ids, random_model

from markovsafety.interventions import Pair, fit_filter, open_host


def pair(prompt, answer="sure <eos>", harmful=None, category="all"):
    return Pair(tuple(ids(f"<bos> {prompt}")), tuple(ids(answer)), harmful, category)


HARMFUL = [pair(f"{w} poison", "sorry i cannot <eos>", True, "bio") for w in ("help", "step", "one", "tea", "hello")]
HARMLESS = [pair(f"{w} tea .", "sure step one <eos>", False) for w in ("help", "step", "one", "poisonous", "hello")]

MIXED = [*HARMFUL[:2], HARMLESS[0], pair("help one tea step poison", harmful=False)]  # of different lengths


def prompts(pairs):
    return [np.array(p.prompt) for p in pairs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("other"), "llama", seed=1)


@pytest.fixture(scope="module")
def host(folder):
    return open_host(folder, device="cpu")


@pytest.fixture(scope="module")
def known(host):
    return fit_filter(host, prompts(HARMFUL), prompts(HARMLESS), level=1, recall=0.5)
