"""The JAX engine on several devices, here four made of one CPU: the same rollouts, the same laws, memory as planned."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import json

import jax
import numpy as np
import pytest
from llama_families import EOS, job_of, random_contexts, write_tokenizer
from safetensors.numpy import save_file

from markovsafety.errors import InputError, ModelError
from markovsafety.rollouts.engines import jax_memory, open_engine
from markovsafety.rollouts.engines.jax_home import Home, devices_named, homes_of
from markovsafety.rollouts.engines.llama_folder import expected_shapes, read_config
from markovsafety.rollouts.rules import Rule

VOCAB = 64
CONTEXTS = random_contexts(5, 3, 9)
PARTS = ("qkv", "qkv_bias", "gate_up", "gate_up_bias", "out", "down")


def write_model(folder, **options):
    """A random Llama with every bias, eight heads and four of keys and values."""
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "attention_bias": True,
        "mlp_bias": True,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        **options,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = expected_shapes(read_config(folder))
    save_file(
        {n: (rng.normal(size=s) * 0.3 + n.endswith("norm.weight")).astype(np.float32) for n, s in shapes.items()},
        folder / "model.safetensors",
    )
    write_tokenizer(folder, VOCAB)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    assert len(jax.devices("cpu")) == 4, "JAX was imported before this file could ask for four devices"
    return write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def alone(folder):
    return open_engine("jax", folder, batch_size=16, workers=1, shard=None)


def job(repeat, **options):
    return job_of(CONTEXTS, repeat, max_tokens=8, classes={"some": np.arange(10, 20)}, **options)


def test_copies_on_devices_sample_what_one_samples(folder, alone):
    """Bit for bit: every device runs the program that one alone would run, and sums are the same as well."""
    spread = open_engine("jax", folder, batch_size=32, workers=2, shard="data", device="cpu:0,3")
    assert [home.devices[0].id for home in spread.homes] == [0, 3]
    assert spread.describe()["copies"] == 2
    asked = job(16)
    one, two = alone.run(asked), spread.run(asked)
    assert two.info["workers"] == 2
    for kind in ("tokens", "logprob"):
        assert all(np.array_equal(a, b) for a, b in zip(getattr(one, kind), getattr(two, kind)))
    assert all(np.array_equal(a, b) for a, b in zip(one.mass["some"], two.mass["some"]))
    rule = Rule.of([40, 41, 42], range(50, 58), [EOS], "first")
    first, second = (engine.tally(asked, 1, rule, np.arange(len(asked)) // 40) for engine in (alone, spread))
    assert (first.outcomes.sum(0) > 0).all()
    assert np.array_equal(first.outcomes, second.outcomes)
    assert np.array_equal(first.grams, second.grams)
    for name, table in first.tables.items():
        assert all(np.array_equal(values, second.tables[name][key]) for key, values in table.items())


def test_one_model_split_over_devices_has_the_same_laws(folder, alone):
    """Prompts and tokens one by one, with heads, keys and values, MLP and output layer in four parts."""
    split = open_engine("jax", folder, batch_size=16, shard="tensor", device="cpu")
    assert split.describe()["tensor_parallel"] == split.homes[0].ways == 4
    for name in PARTS:
        whole = split.params["layers"][1][name]
        assert [4 * piece.data.size for piece in whole.addressable_shards] == [whole.size] * 4
    assert split.params["head"].addressable_shards[1].data.shape == (VOCAB // 4, 32)
    asked = job(8)
    one, two = alone.run(asked), split.run(asked)
    alike = [np.array_equal(a, b) for a, b in zip(one.tokens, two.tokens)]
    assert np.mean(alike) > 0.9  # a uniform number may fall between two roundings of one cumulative sum
    for same, a, b in zip(alike, one.logprob, two.logprob):
        np.testing.assert_allclose(a if same else b, b, atol=2e-5)
    assert two.info["memory"]["cache_per_rollout"] * 4 == one.info["memory"]["cache_per_rollout"]


def test_an_edit_acts_on_every_part(tmp_path):
    """A tied model: its embedding is split by rows; a head that lies on the second device is shifted."""
    from markovsafety.interventions import Edit
    from markovsafety.interventions.edits import Part

    folder = write_model(tmp_path / "tied", tie_word_embeddings=True)
    asked = job(1)
    answers = [np.arange(5, 13, dtype=np.int32)] * 5
    edit = Edit((Part("head", np.full(4, 2.0), layer=1, head=6), Part("add", np.linspace(-1, 1, 32), layer=1)))
    told = []
    for shard in (None, "tensor"):
        engine = open_engine("jax", folder, shard=shard, device="cpu:0,1").edited(edit)
        told.append(np.concatenate(engine.score(asked, answers).logprob))
    plain = np.concatenate(open_engine("jax", folder, shard=None).score(asked, answers).logprob)
    np.testing.assert_allclose(*told, atol=2e-5)
    assert np.abs(told[0] - plain).max() > 0.1


def test_devices_have_names(folder):
    assert [d.id for d in devices_named("cpu")] == [0, 1, 2, 3]
    assert [d.id for d in devices_named("cpu:2,0")] == [2, 0]
    for name in ("gpu", "cpu:7", "cpu:x", "toaster"):
        with pytest.raises(InputError, match="there is no device"):
            devices_named(name)
    with pytest.raises(InputError, match="cannot be split over 3 devices") as caught:
        open_engine("jax", folder, shard="tensor", device="cpu:0,1,2")
    assert "1 or 2 of the devices" in caught.value.next
    with pytest.raises(InputError, match="no sharding 'pipeline'"):
        open_engine("jax", folder, shard="pipeline")
    with pytest.raises(InputError, match="kernel cannot be used") as caught:
        open_engine("jax", folder, attention="kernel")
    assert "float32" in caught.value.cause


@pytest.mark.parametrize(
    ("name", "has", "place"),
    [
        (None, True, "cuda"), (None, False, "cpu"), ("gpu", True, "cuda"), ("gpu:1", True, "cuda:1"),
        ("cuda:1", True, "cuda:1"), ("cpu", True, "cpu"), ("gpu", False, None), ("cuda", False, None),
        ("cuda:0", False, None),
    ],
)  # fmt: skip
def test_transformers_takes_gpu_and_cuda_alike(monkeypatch, name, has, place):
    torch = pytest.importorskip("torch")
    from markovsafety.rollouts.engines.transformers_load import device_of

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has)
    if place is not None:
        assert device_of(name) == place
        return
    with pytest.raises(InputError, match="there is no GPU"):
        device_of(name)


def test_only_the_jax_engine_shards(folder):
    with pytest.raises(InputError, match="'transformers' does not shard") as caught:
        open_engine("transformers", folder, shard="data")
    assert "device=" in caught.value.next


class Card:
    """A device that says how much memory it has."""

    platform = "gpu"

    def __init__(self, free: float):
        self.free = free

    def memory_stats(self):
        return {"bytes_limit": int(self.free) + 1000, "bytes_in_use": 1000}


def test_auto_takes_as_few_devices_a_copy_as_have_room(folder):
    config, cards = read_config(folder), [Card(1e9) for _ in range(4)]
    for least in (1, 2, 3, 4):
        homes = homes_of(cards, "auto", config, lambda ways: ways >= least)  # noqa: B023
        ways = {1: 1, 2: 2, 3: 4, 4: 4}[least]  # three do not divide four heads
        assert [home.ways for home in homes] == [ways] * (4 // ways)
        assert len({card for home in homes for card in home.devices}) == 4
    assert len(homes_of(cards, None, config)) == 1
    assert len(homes_of(cards, "data", config)) == 4


def test_memory_is_planned(folder, alone):
    """The plan's bytes are those of the arrays, and the batch is the largest that fits into what it may take."""
    config, home = read_config(folder), Home((jax.devices("cpu")[0],))
    assert jax_memory.weight_bytes(config, "float32", home) == sum(x.nbytes for x in jax.tree.leaves(alone.params))
    info = alone.run(job(4)).info
    plan = info["memory"]
    assert plan["cache_per_rollout"] == 2 * 2 * 4 * 4 * 4 * sum(info["cache_lengths"])

    def fit(free, batch=None, workers=1):
        sizes = {"lengths": (512,), "prompts": 4, "width": 32, "workers": workers, "devices": 2}
        return jax_memory.fitting(config, "float32", home, batch=batch, free=free, most=256, **sizes)

    for free in (3e6, 1e7, 2e7):
        found = fit(int(free))
        assert found.needed <= free < found.needed + 8 * found.row
        assert found.batch % 8 == 0
        assert fit(int(free), workers=2).batch < found.batch
    assert fit(int(1e12)).batch == 256
    assert fit(None).batch == 256
    with pytest.raises(ModelError, match=r"128 rollouts side by side need .* a device has 0\.01 GB free") as caught:
        fit(int(1e7), batch=128)
    assert "one rollout of 512 tokens take" in caught.value.cause
    for cure in ("bfloat16", "tensor", "batch_size", "more devices"):
        assert cure in caught.value.next
    assert jax_memory.free_bytes(Home((Card(2e9), Card(1e9)))) == int(0.95e9)
    assert jax_memory.free_bytes(Home((Card(2e9),)), limit=10_000, taken=4_000) == 6_000


def test_too_little_memory_is_said_before_the_weights_are_read(folder, tmp_path):
    (tmp_path / "torn").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "torn" / name).write_text((folder / name).read_text())
    with pytest.raises(ModelError, match=r"needs .* on each of 1 device, which has 0.0002 GB free"):
        open_engine("jax", tmp_path / "torn", memory=200_000)
    engine = open_engine("jax", folder, memory=600_000, batch_size=4096)
    with pytest.raises(ModelError, match="rollouts side by side need"):
        engine.run(job(900))
    small = open_engine("jax", folder, memory=600_000, workers=1)
    assert 8 <= small._plans(job(900))[0].shape.batch < 64


def test_prompts_share_few_programs(alone):
    """Widths of prompts are powers of two, so that any lengths take a handful of programs."""
    contexts = random_contexts(60, 3, 100)
    plan = alone._plans(job_of(contexts, 4, max_tokens=20))[0]
    widths = {block.width for block in plan.blocks}
    assert widths <= {16, 32, 64, 96}
    assert len(plan.lengths) <= 3
    for block in plan.blocks:
        assert max(len(plan.contexts[i]) for i in block.contexts) <= block.width
