"""Where a model can be read and edited: found by structure, validated, found once; and the system message of a host.

Random models of many families (transformers): no number here depends on what a model has learned.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from hosts import PROMPTS, add, folders, hosts, llama

from markovsafety import ModelError, sample
from markovsafety.interventions import open_host
from markovsafety.interventions.host import Host
from markovsafety.rollouts.engines import open_engine

__all__ = ["folders", "hosts", "llama"]  # fixtures


def test_a_model_without_attention_is_refused_with_the_names_found(tmp_path, folders):
    engine = open_engine("transformers", folders["llama"], device="cpu")
    for block in engine.model.model.layers:
        del block.self_attn
    with pytest.raises(ModelError, match="3 blocks of LlamaForCausalLM are not found") as caught:
        Host.of(engine)
    assert "model.layers (3 modules, 0 with attention)" in caught.value.cause


def test_a_projection_under_another_name_is_found_by_its_shape_or_refused_with_the_names(folders):
    engine = open_engine("transformers", folders["llama"], device="cpu")
    for block in engine.model.model.layers:
        block.self_attn.add_module("twin", torch.nn.Linear(32, 24))
        assert Host.of  # a second map of the shape: the known name decides
    assert Host.of(engine).mixers[0] is engine.model.model.layers[0].self_attn.o_proj
    for block in engine.model.model.layers:
        attention = block.self_attn
        attention.add_module("strange", attention.o_proj)
        attention.add_module("odd", attention.twin)
        del attention.o_proj, attention.twin
    with pytest.raises(ModelError, match="output projection of layer 0") as caught:
        Host.of(engine)
    assert "strange (32, 24)" in caught.value.cause


def test_quantised_layers_are_refused(folders):
    engine = open_engine("transformers", folders["llama"], device="cpu")
    projection = engine.model.model.layers[1].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="layer 1 is quantised"):
        Host.of(engine)


def test_validation_notices_a_site_that_the_model_does_not_compute_with(folders):
    """The head's slice is found, but what leaves the projection is scaled behind our back."""
    engine = open_engine("transformers", folders["llama"], device="cpu")
    projection = engine.model.model.layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))  # heads in another order
    with pytest.raises(ModelError, match="head 3 of layer 0 adds does not change as an edit predicts"):
        Host.of(dataclasses.replace(engine))


def test_dropout_is_noticed(folders):
    engine = open_engine("transformers", folders["gpt2"], device="cpu")
    engine.model.train()
    with pytest.raises(ModelError):
        Host.of(engine)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_numbers_that_are_not_finite_are_called_so(folders, dtype):
    engine = open_engine("transformers", folders["llama"], device="cpu", dtype=dtype)
    big = torch.finfo(engine.model.dtype).max
    for block in engine.model.model.layers:
        block.mlp.down_proj.register_forward_hook(lambda module, args, output: output * big * big)
    with pytest.raises(ModelError, match="not finite") as caught:
        Host.of(engine)
    assert dtype in caught.value.cause
    assert "bfloat16" in caught.value.next


def test_a_stream_of_another_shape_is_a_model_that_is_not_understood(folders):
    engine = open_engine("transformers", folders["llama"], device="cpu")
    block = engine.model.model.layers[1]
    plain = block.forward
    block.forward = lambda x, *args, **kwargs: plain(x[0] if x.dim() == 4 else x, *args, **kwargs)
    block.register_forward_pre_hook(lambda module, args: (args[0][None], *args[1:]), prepend=False)
    with pytest.raises(ModelError, match=r"shape \(1, 1, 6, 24\) for one row of 6 tokens"):
        Host.of(engine)


def test_an_offloaded_embedding_is_no_place_for_inputs(folders):
    engine = open_engine("transformers", folders["llama"], device="cpu")
    with pytest.raises(ModelError, match="on no device"):
        _ = dataclasses.replace(engine, model=engine.model.to("meta")).device


def test_binding_again_runs_and_reads_nothing(folders, monkeypatch):
    engine = open_engine("transformers", folders["llama"], device="cpu")
    made = Host.of(engine)
    edit = dataclasses.replace(add(made, 1), model=made.identity[0], template=made.identity[1])

    def again(*args, **options):
        raise RuntimeError("again")

    monkeypatch.setattr(Host, "forward", again)
    monkeypatch.setattr("markovsafety.interventions.host._blocks", again)
    monkeypatch.setattr("markovsafety.rollouts.engines.transformers.weights_hash", again)
    bound = edit.bind(dataclasses.replace(engine, batch_size=3))
    assert bound.host.mixers == made.mixers
    assert bound.host.decoder is made.decoder
    with pytest.raises(RuntimeError, match="again"):
        edit.bind(dataclasses.replace(engine, model=copy.deepcopy(engine.model)))
    projection = engine.model.model.layers[2].self_attn.o_proj
    engine.model.model.layers[2].self_attn.o_proj = copy.deepcopy(projection)
    with pytest.raises(RuntimeError, match="again"):  # another module in its place is found anew
        edit.bind(engine)


def test_weights_that_changed_on_disk_have_another_identity(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "model")
    engine = open_engine("transformers", tmp_path / "model", device="cpu")
    before = Host.of(engine).identity
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    assert Host.of(engine).identity != before


def test_a_system_message_stands_before_every_prompt_of_a_host(llama):
    host = open_host(llama.engine, system="the sea is")
    for mine, given in zip(host.prompt_ids(PROMPTS), llama.prompt_ids(PROMPTS, "the sea is")):
        np.testing.assert_array_equal(mine, given)
    assert host.spans() == llama.spans(system="the sea is")
    assert host.identity == llama.identity
    told = {"n": 2, "max_tokens": 3, "progress": False}
    rolls = sample(host.engine, PROMPTS, **told)
    given = sample(llama.engine, PROMPTS, system="the sea is", **told)
    np.testing.assert_array_equal(rolls.tokens, given.tokens)
    assert rolls.provenance["sampling"]["system"] == given.provenance["sampling"]["system"] == "the sea is"
    own = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    np.testing.assert_array_equal(host.engine.tokenizer.prompt_ids(own), llama.engine.tokenizer.prompt_ids(own))
