"""Edits as data: files, models they belong to, and bad input (transformers is needed to bind them)."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from hosts import GQA, PROMPTS, add, folders, hosts, llama, vector
from safetensors.numpy import save_file
from tiny import WORDS, random_model, table_engine

from markovsafety import Edit, InputError, UntrustedError, sample
from markovsafety.interventions import open_host, read_edit, write_edit
from markovsafety.interventions.edits import Part
from markovsafety.interventions.record import activations, laws, token_mass
from markovsafety.interventions.storage import write_tensors

__all__ = ["folders", "hosts", "llama"]  # fixtures


def test_an_edit_survives_its_file(llama, tmp_path):
    parts = (Part("head", vector(8), layer=1, head=2, scale=-3, when="every"), Part("tilt", np.ones((2, 5))))
    edit = Edit(parts, *llama.identity, sign="positive pushes towards refusal", about={"n": 3})
    write_edit(edit, tmp_path / "e.safetensors")
    again = read_edit(tmp_path / "e.safetensors")
    assert again.describe() == edit.describe()
    assert (again.sign, again.about) == (edit.sign, edit.about)
    for a, b in zip(edit.parts, again.parts):
        np.testing.assert_array_equal(a.vector, b.vector)


def test_files_that_hold_something_else_are_refused(tmp_path):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "weights.safetensors")
    write_tensors(tmp_path / "d.safetensors", "direction", {"x": np.zeros(2)}, {})
    write_tensors(tmp_path / "half.safetensors", "edit", {}, {"parts": [{"kind": "add"}], "model": None})
    (tmp_path / "text.safetensors").write_text("no")
    for name, says in [
        ("gone", "is not there"),
        ("weights", "holds no edit"),
        ("d", "it holds a markovsafety direction"),
        ("half", "only part of an edit"),
        ("text", "no safetensors file"),
    ]:
        with pytest.raises(InputError, match=says):
            read_edit(tmp_path / f"{name}.safetensors")


def test_an_edit_for_another_model_is_refused_unless_it_is_transferred(llama, hosts, folders, tmp_path):
    edit = dataclasses.replace(add(llama, 1), model=llama.identity[0], template=llama.identity[1])
    other = open_host(random_model(tmp_path / "other", "llama", seed=5, **GQA), device="cpu")
    with pytest.raises(InputError, match="another model: its weights differ"):
        laws(other, PROMPTS, edit=edit)
    assert laws(other, PROMPTS, edit=edit.transferred()).shape == (3, 1, len(WORDS))
    shutil.copytree(folders["llama"], tmp_path / "copy")
    text = (tmp_path / "copy" / "tokenizer_config.json").read_text()
    (tmp_path / "copy" / "tokenizer_config.json").write_text(text.replace("{% endfor %}", "{% endfor %}sure "))
    with pytest.raises(InputError, match="its chat template differ"):
        laws(open_host(tmp_path / "copy", device="cpu"), PROMPTS, edit=edit)
    with pytest.raises(InputError, match="different models cannot be added"):
        _ = edit + Edit((), model="other")


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (Part("add", np.ones(7)), "with 7 numbers does not fit"),
        (Part("add", np.ones(24), layer=4), "at layer 4"),
        (Part("head", np.ones(8), layer=3), "at layer 3, head 0"),
        (Part("head", np.ones(8), head=4), "head 4"),
        (Part("tilt", np.ones(len(WORDS) + 1)), "does not fit"),
    ],
)
def test_parts_that_do_not_fit_are_refused(llama, part, says):
    with pytest.raises(InputError, match=says):
        laws(llama, PROMPTS, edit=Edit((part,)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("push", [1.0]), "no edit of kind 'push'"),
        (("add", [[1.0]]), "has shape"),
        (("add", [np.nan]), "not finite"),
        (("project", [0.0, 0.0]), "zero vector"),
        (("add", []), "has shape"),
    ],
)
def test_impossible_parts_are_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        Part(*arguments)


def test_bad_requests_are_refused(llama, folders, tmp_path):
    with pytest.raises(InputError, match="prompt 0 has 2 tokens and no position -5"):
        activations(llama, PROMPTS, (-5,))
    with pytest.raises(InputError, match="no level 4"):
        activations(llama, PROMPTS, levels=[4])
    with pytest.raises(InputError, match="no prompt"):
        activations(llama, [])
    with pytest.raises(InputError, match="prompt 0 has 0 tokens"):
        activations(llama, [np.zeros(0, np.int64)])
    with pytest.raises(InputError, match="has 65 tokens"):
        activations(llama, [np.full(65, 5)])
    with pytest.raises(InputError, match="no tokens of the model"):
        token_mass(llama, PROMPTS, [len(WORDS)])
    with pytest.raises(InputError, match="laws were asked for"):
        laws(llama, PROMPTS, last=9)
    with pytest.raises(InputError, match="cannot edit activations"):
        sample(table_engine(tmp_path / "table"), PROMPTS, n=1, max_tokens=2, edit=add(llama, 1))
    with pytest.raises(InputError, match="edited already"):
        open_host(llama.engine.edited(add(llama, 1)))
    with pytest.raises(InputError, match="model is dict"):
        open_host({})


def test_activations_that_are_not_finite_are_not_returned(llama):
    huge = Edit((Part("add", np.full(llama.width, 3e38), where=(0, None)),))
    with pytest.raises(UntrustedError, match="an activation of the model is not finite"):
        activations(llama, PROMPTS, edit=huge + huge)
    with pytest.raises(InputError, match="not finite"):
        _ = 10 * huge
