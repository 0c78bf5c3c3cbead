"""Good files of every kind that the package reads, and what reads them; see `fuzzing`."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzzed_chains import POOLED, Make, chain, counts, rolls, stored_layers, taken
from fuzzing import (
    Reader,
    damage_bytes,
    damage_cells,
    damage_document,
    damage_lines,
    damage_npz,
    damage_table,
    damage_tensors,
)

import markovsafety as ms
from markovsafety import arguments, organism, tables
from markovsafety.errors import InputError
from markovsafety.rollouts.asked import read_prompts
from markovsafety.rollouts.engines.folder import check_folder
from markovsafety.rollouts.engines.llama_folder import read_config, read_weights
from markovsafety.rollouts.streaming import stream
from markovsafety.rollouts.sums import Added, read_added, write_added
from markovsafety.rollouts.template import Template


def sums(folder: Path) -> Reader:
    path = folder / "x.npz"
    table = {k: np.array([0, 0], np.int64) for k in ("group", "source", "target", "count")}
    grams, outcomes = np.array([[-1, -1], [-1, 3]], np.int32), np.array([[1, 1, 0, 0]])
    added = Added(grams, outcomes, {"transitions": table, "passages": table}, {"seconds": 1.0})
    write_added(added, path)
    return Reader("sums", "x.npz", [taken(path)], lambda p: read_added(p, 2), damage_npz)


def rollouts(folder: Path) -> Reader:
    path = folder / "x.parquet"
    ms.write_rollouts(rolls(), path)
    return Reader("rollouts", "x.parquet", [taken(path)], ms.read_rollouts, damage_table)


def _streamed(path: Path) -> Any:
    for skip in (False, True):
        found = stream(path, skip_corrupt=skip)
        for batch in found.batches(found.columns, tokens=5):
            len(batch)
    return found.largest_token(), ms.count(path, ms.KGram(1))


def streamed(folder: Path) -> Reader:
    """Rollouts that are read batch by batch."""
    path = folder / "x.parquet"
    ms.write_rollouts(rolls(), path)
    return Reader("streamed", "x.parquet", [taken(path)], _streamed, damage_table)


def streamed_shards(folder: Path) -> Reader:
    """The manifest of a folder whose shards are read batch by batch."""
    return replace(shards(folder), name="streamed_shards", read=lambda p: list(stream(p.parent).batches()))


def shards(folder: Path) -> Reader:
    """The manifest of a folder of shards."""
    ms.write_rollouts(rolls(), folder / "part-00000.parquet")
    manifest = {"format": 1, "total": 6, "shards": 1, "shard_size": 8, "parameters": {}, "provenance": {"created": "x"}}
    seed = json.dumps(manifest).encode()
    return Reader("shards", "manifest.json", [seed], lambda p: ms.read_rollouts(p.parent), damage_document)


def _template() -> Any:
    return Template.load(organism.model_path("shallow"))


def lines(rows: Sequence[Any]) -> bytes:
    """JSON lines."""
    return b"\n".join(json.dumps(row).encode("utf-8", "replace") for row in rows)


def log(folder: Path) -> Reader:
    template = _template()
    ids = {"prompt_id": 1, "tokens": [5, 9, 2], "outcome": "harm", "hit": 2, "logprob": [-1, -2.5, None], "weight": 1.0}
    texts = {"prompt": "how do i", "text": "sure . step", "finish_reason": "stop", "category": "a"}
    talk = {**texts, "prompt": [{"role": "user", "content": "how do i"}]}
    forced = {"prompt_tokens": [1, 2], "tokens": [4, 5], "prefill": 1, "finish_reason": "length"}
    seeds = [lines([ids, {**ids, "prompt_id": 2}]), lines([texts, talk]), lines([forced])]
    return Reader("log", "x.jsonl", seeds, lambda p: ms.read_rollouts(p, template=template), damage_lines)


def prompts(folder: Path) -> Reader:
    rows = [
        {"prompt": "how do i", "category": "a", "prefix": "sure", "prompt_id": 3},
        {"prompt": [{"role": "user", "content": "x"}], "category": "b"},
        {"prompt_tokens": [3, 4, 5]},
    ]
    template = _template()

    def read(path: Path) -> Any:
        from markovsafety.rollouts.asked import ask

        return ask(path, template, prefix=None, prefill=[0], system=None)

    return Reader("prompts", "x.jsonl", [lines(rows), lines(rows[:1])], read, damage_lines)


def prompt_table(folder: Path) -> Reader:
    seed = b"prompt,category,prefix\nhow do i,a,sure\nwhat is,b,okay\n"
    return Reader("prompt_table", "x.csv", [seed], read_prompts, damage_cells)


def labels(folder: Path) -> Reader:
    seed = b"row,outcome\n0,harm\n1,refusal\n2,\n"
    return Reader("labels", "x.csv", [seed], lambda p: arguments.labels_of(str(p), []), damage_cells)


def phrases(folder: Path) -> Reader:
    return Reader("phrases", "x.txt", [b"i cannot\nsorry\n"], arguments.lines_of, damage_bytes)


HARM = {"hidden": [16, 16], "depth": [0, 4], "k": [0, 0], "harm": [0.5, 0.1], "lower": [0.4, 0.0], "upper": [0.6, 0.2]}


def harm_table(folder: Path) -> Reader:
    rows = [",".join(HARM), *(",".join(str(v[i]) for v in HARM.values()) for i in range(2))]
    seed = "\n".join(rows).encode()
    return Reader("harm_table", "x.csv", [seed], lambda p: tables.capacity_table(str(p)), damage_cells)


def harm_parquet(folder: Path) -> Reader:
    out = io.BytesIO()
    pq.write_table(pa.table(HARM), out)
    read = lambda p: tables.capacity_table(str(p))  # noqa: E731
    return Reader("harm_parquet", "x.parquet", [out.getvalue()], read, damage_table)


def _copied(folder: Path) -> Path:
    for file in organism.model_path("shallow").iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, folder / file.name)
    return folder


def model_config(folder: Path) -> Reader:
    config = (_copied(folder) / "config.json").read_bytes()
    return Reader("model_config", "config.json", [config], lambda p: read_config(p.parent), damage_document)


def model_weights(folder: Path) -> Reader:
    """A very small model's weights."""
    from safetensors.numpy import save

    from markovsafety.rollouts.engines.llama_folder import expected_shapes

    told = json.loads((_copied(folder) / "config.json").read_text())
    small = {
        "vocab_size": 5,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 4,
    }
    (folder / "config.json").write_text(json.dumps({**told, **small, "num_key_value_heads": 2, "head_dim": 2}))
    config = read_config(folder)
    arrays = {name: np.ones(shape, np.float16) for name, shape in expected_shapes(config).items()}
    seed = save(arrays, {"format": "pt", "about": "{}"})
    return Reader(
        "model_weights", "model.safetensors", [seed], lambda p: read_weights(p.parent, config), damage_tensors
    )


def weight_index(folder: Path) -> Reader:
    _copied(folder)
    (folder / "part-1.safetensors").write_bytes(b"")
    seed = json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a.weight": "part-1.safetensors"}}).encode()
    return Reader(
        "weight_index", "model.safetensors.index.json", [seed], lambda p: check_folder(p.parent), damage_document
    )


def _loaded(path: Path) -> Any:
    template = Template.load(path.parent)
    template.prompt_ids("how do i")
    return template.decode([1, 2, 3]), template.hashes()


def tokenizer(folder: Path) -> Reader:
    seed = (_copied(folder) / "tokenizer.json").read_bytes()
    return Reader("tokenizer", "tokenizer.json", [seed], _loaded, damage_document)


def tokenizer_config(folder: Path) -> Reader:
    seed = (_copied(folder) / "tokenizer_config.json").read_bytes()
    return Reader("tokenizer_config", "tokenizer_config.json", [seed], _loaded, damage_document)


def generation_config(folder: Path) -> Reader:
    seed = (_copied(folder) / "generation_config.json").read_bytes()
    return Reader("generation_config", "generation_config.json", [seed], _loaded, damage_document)


def chat_template(folder: Path) -> Reader:
    _copied(folder)
    seeds = [
        b"{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}"
        b"<a>{% endif %}",
        b"{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for m in "
        b"messages %}{{ '<|' + m.role + '|>' + m.content }}{% if loop.last %}{{ strftime_now('%Y') }}{% endif %}"
        b"{% endfor %}",
    ]
    return Reader("chat_template", "chat_template.jinja", seeds, _loaded, damage_bytes)


# --- safetensors of the interventions room ---


def _tensors(name: str, made: Callable[[Path], Any], read: Callable[[Path], Any]) -> Make:
    def make(folder: Path) -> Reader:
        path = folder / "x.safetensors"
        made(path)
        return Reader(name, path.name, [taken(path)], read, damage_tensors)

    make.__name__ = name
    return make


def _direction() -> Any:
    vectors = np.ones((3, 4), np.float32)
    return ms.Direction(vectors, position=-1, names=("harmful", "harmless"), counts=(3, 3), where=[-1, None], level=2)


def _write_edit(path: Path) -> None:
    from markovsafety.interventions.edits import Part, write_edit

    parts = (
        Part("add", np.ones(4, np.float32), layer=1, where=(-1, None), when="prompt"),
        Part("head", np.ones(2, np.float32), layer=0, head=1, scale=2.0),
        Part("tilt", np.ones((2, 5), np.float32), scale=-1.0, when="answer"),
    )
    write_edit(ms.Edit(parts, "m", "t", "a sign", {"made": "here"}), path)


def _read_edit(path: Path) -> Any:
    from markovsafety.interventions.edits import read_edit

    edit = read_edit(path)
    return edit + edit, -edit, edit.control(0)


def _write_direction(path: Path) -> None:
    from markovsafety.interventions.directions import write_direction

    write_direction(_direction(), path)


def _read_direction(path: Path) -> Any:
    from markovsafety.interventions.directions import read_direction

    return read_direction(path)


def _write_monitor(path: Path) -> None:
    from markovsafety.interventions.monitor import fit_monitor, write_monitor

    rng = np.random.default_rng(0)
    write_monitor(fit_monitor(rng.standard_normal((24, 2, 3)), levels=(1, 2), rate=0.1), path)


def _read_monitor(path: Path) -> Any:
    from markovsafety.interventions.monitor import read_monitor

    monitor = read_monitor(path)
    return monitor.level_scores(np.zeros((2, len(monitor.levels), monitor.mean.shape[1])))


def _write_heads(path: Path) -> None:
    from markovsafety.interventions.heads import HeadDirections, write_head_directions

    theta = np.zeros((2, 2, 3), np.float32)
    theta[..., 0] = 1
    told = {k: np.ones((2, 2)) for k in ("sigma", "gap", "size")}
    write_head_directions(
        HeadDirections(theta, **told, counts=(3, 3), contrast="prompt end", sign="s", model=None, template=None), path
    )


def _read_heads(path: Path) -> Any:
    from markovsafety.interventions.heads import read_head_directions

    return read_head_directions(path)


def _write_table(path: Path) -> None:
    from markovsafety.interventions.bias_tables import BiasTable, write_bias_table

    bias, counted = np.zeros((2, 5)), np.ones((2, 5), bool)
    told = {"safe": "a", "ref": "b", "pool": "c", "n": 4, "response": "random", "template": None, "about": {"seed": 0}}
    write_bias_table(BiasTable(bias, bias, counted, np.array([4, 4]), **told), path)


def _read_table(path: Path) -> Any:
    from markovsafety.interventions.bias_tables import read_bias_table

    return read_bias_table(path).edit(0.5)


def _filter() -> Any:
    from markovsafety.interventions.data_filter import CURVE, RefusalFilter

    share = ms.Bound(0.95, 0.9, 1.0, 0.95, {"sampling": 0.1}, None, {"name": "recall"})
    curve = {name: np.linspace(0, 1, 3) for name in CURVE}
    return RefusalFilter(_direction(), 0.1, 0.95, share, share, share, curve, {"made": "here"})


def _write_filter(path: Path) -> None:
    from markovsafety.interventions.data_filter import write_filter

    write_filter(_filter(), path)


def _read_filter(path: Path) -> Any:
    from markovsafety.interventions.data_filter import read_filter

    return read_filter(path).drops(np.array([0.0, 1.0]))


def _write_watch(path: Path) -> None:
    from markovsafety.interventions.data_drift import DataMonitor, write_data_monitor

    write_data_monitor(DataMonitor(np.linspace(-1, 1, 9), np.zeros(9, bool), 0.1), path)


def _read_watch(path: Path) -> Any:
    from markovsafety.interventions.data_drift import read_data_monitor

    return read_data_monitor(path).spent(3)


EDIT = _tensors("edit", _write_edit, _read_edit)
DIRECTION = _tensors("direction", _write_direction, _read_direction)
MONITOR = _tensors("monitor", _write_monitor, _read_monitor)
HEADS = _tensors("head_directions", _write_heads, _read_heads)
BIAS = _tensors("bias_table", _write_table, _read_table)
FILTER = _tensors("filter", _write_filter, _read_filter)
WATCH = _tensors("data_monitor", _write_watch, _read_watch)


def pairs(folder: Path) -> Reader:
    from markovsafety.interventions.pairs import read_pairs

    template = _template()
    rows = [
        {"prompt": "how do i", "answer": "sure .", "harmful": True, "category": "a"},
        {"prompt_tokens": [3, 4], "answer": [5, 6, 2], "harmful": False},
        {"prompt": "what is", "answer": "step", "harmful": None},
    ]
    return Reader("pairs", "x.jsonl", [lines(rows)], lambda p: read_pairs(p, template), damage_lines)


def triplets(folder: Path) -> Reader:
    from markovsafety.interventions.triplets import read_triplets

    template = _template()
    rows = [
        {"prompt": "how do i", "answer": "sure .", "refusal": "sorry", "category": "a"},
        {"prompt_tokens": [3, 4], "answer": [5, 6, 2], "refusal": [7, 2]},
    ]
    return Reader("triplets", "x.jsonl", [lines(rows)], lambda p: read_triplets(p, template), damage_lines)


def review(folder: Path) -> Reader:
    from markovsafety.interventions.sifting import read_review

    seed = b"sha256,decision,filter\nabc,keep,drop\nabd,drop,drop\nabe,,keep\n"
    return Reader("review", "x.csv", [seed], read_review, damage_cells)


ALL: tuple[Make, ...] = (
    *(chain, stored_layers, *POOLED, counts, sums, rollouts, shards, streamed, streamed_shards, log, prompts),
    *(prompt_table, labels, phrases, harm_table, harm_parquet),
    *(model_config, model_weights, weight_index, tokenizer, tokenizer_config, generation_config, chat_template),
    *(EDIT, DIRECTION, MONITOR, HEADS, BIAS, FILTER, WATCH, pairs, triplets, review),
)


def readers(names: Sequence[str] | None = None) -> list[Make]:
    """Those of these names, or all."""
    known = {make.__name__: make for make in ALL}
    unknown = sorted({*(names or ())} - {*known})
    if unknown:
        raise InputError(f"no reader {unknown[0]}", cause=f"there are {', '.join(known)}", next="choose among them")
    return [known[name] for name in names] if names else list(ALL)
