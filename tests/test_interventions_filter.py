"""The filter of fine-tuning data: pairs, threshold, report, reviews by people, and drift of what comes in."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from labelled_pairs import HARMFUL, HARMLESS, MIXED, folder, host, known, other, prompts
from tiny import ids

from markovsafety.errors import InputError, UntrustedError
from markovsafety.interventions import (
    DataMonitor,
    Pair,
    Sifted,
    activations,
    choose_threshold,
    difference,
    fit_data_monitor,
    fit_filter,
    open_host,
    read_data_monitor,
    read_filter,
    read_pairs,
    read_review,
    reviewed,
    sift,
    train_student,
    watch_data,
    write_data_monitor,
    write_filter,
    write_review,
    write_sifted,
)

__all__ = ["folder", "host", "known", "other"]  # fixtures

EOS = 2


# --- pairs ---


def test_pairs_are_read_from_files_and_records(host, tmp_path):
    records = [
        {"prompt": "help tea", "answer": "sure one", "harmful": "yes", "category": "bio"},
        {"prompt": "hello", "answer": "sure", "harmful": ""},
    ]
    with open(tmp_path / "x.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer", "harmful", "category"])
        writer.writeheader()
        writer.writerows(records)
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps(r | {"harmful": bool(r["harmful"]) or None}) + "\n" for r in records)
    )
    template = host.engine.tokenizer
    made = [read_pairs(source, template) for source in (records, tmp_path / "x.csv", tmp_path / "x.jsonl")]
    assert made[0] == made[1] == made[2]
    first, second = made[0]
    assert first == Pair(tuple(ids("<bos> help tea")), tuple(ids("sure one <eos>")), True, "bio")
    assert (second.harmful, second.category) == (None, "all")
    assert first.row.tokens == ids("<bos> help tea sure one <eos>")
    assert (first.row.answer, first.row.loss_from) == (3, 3)
    assert len({p.sha256 for p in (first, second, dataclasses.replace(first, answer=first.answer[:-1]))}) == 3
    assert read_pairs([{"prompt": "hello"}], template, harmful=True, answers=False)[0] == Pair((1, 4), (), True)


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([], "no pairs"),
        ([{"prompt": "hello"}], "pair 0 has no answer"),
        ([{"prompt": "hello", "answer": ""}], "has no answer"),
        ([{"answer": "sure"}], "has no prompt"),
        ([{"prompt": "hello", "answer": "sure", "harmful": "maybe"}], "label 'maybe'"),
        ([{"prompt_tokens": ["x"], "answer": "sure"}], "cannot be encoded"),
    ],
)
def test_pairs_that_cannot_be_read(host, records, says):
    with pytest.raises(InputError, match=says):
        read_pairs(records, host.engine.tokenizer)


# --- the threshold ---


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_has_the_recall_with_the_fewest_false_drops(seed):
    rng = np.random.default_rng(seed)
    up, down = rng.normal(0.4, 0.3, 60).clip(-1, 1), rng.normal(0, 0.3, 80).clip(-1, 1)
    for recall in (0.3, 0.8, 0.95):
        at = choose_threshold(up, down, recall)
        assert (up > at).mean() >= recall
        every = np.sort(np.concatenate([up, down])) + 1e-9
        fit = [t for t in every if (up > t).mean() >= recall]
        assert (down > at).mean() == min((down > t).mean() for t in fit)


def test_between_kinds_that_are_apart_it_is_the_middle():
    assert choose_threshold(np.array([0.5, 0.8, 0.9]), np.array([-0.7, -0.1]), 0.6) == pytest.approx(0.2)


def test_where_only_dropping_everything_has_the_recall_nothing_is_fixed():
    with pytest.raises(UntrustedError, match="but one that drops everything") as caught:
        choose_threshold(np.array([-0.9, 0.1]), np.array([0.0, 0.5]), 1.0)
    assert caught.value.partial["tpr"][-1] == 1


def test_a_threshold_outside_the_observed_range_is_refused(host):
    for wrong in (1.5, -1.0):
        with pytest.raises(InputError, match="outside the observed range"):
            fit_filter(host, prompts(HARMFUL), prompts(HARMLESS), level=1, threshold=wrong)
    with pytest.raises(InputError, match="recall is 0"):
        fit_filter(host, prompts(HARMFUL), prompts(HARMLESS), recall=0.0)


def test_of_several_positions_validation_chooses():
    """On the aligned organism: its refusal at the last token, what it holds for harm at the end of the instruction."""
    from markovsafety.organism import model_path
    from markovsafety.organism.tasks import alignment_records

    aligned = open_host(model_path("shallow"), device="cpu")
    pairs = read_pairs(alignment_records(240), aligned.engine.tokenizer)
    sides = [prompts([p for p in pairs if p.harmful is kind]) for kind in (True, False)]
    last, end, chosen = (
        fit_filter(aligned, *sides, position=where) for where in ("t_post", "t_inst", ("t_post", "t_inst"))
    )
    assert last.false_drops.value > 0.1 > end.false_drops.value
    assert min(last.recall.value, end.recall.value) >= 0.95
    assert chosen.to_json() == end.to_json()
    with pytest.raises(InputError, match="no position"):
        fit_filter(aligned, *sides, position=())


@pytest.mark.parametrize("empty", [0, 1])
def test_kinds_that_are_missing(host, empty):
    sides = [prompts(HARMFUL), prompts(HARMLESS)]
    sides[empty] = []
    with pytest.raises(InputError, match=r"harmful|harmless"):
        fit_filter(host, *sides)
    with pytest.raises(InputError, match="to fix the threshold on"):
        fit_filter(host, prompts(HARMFUL), prompts(HARMLESS), validation=(sides[0], sides[1]))


def test_a_level_without_a_feature_is_named(folder, host):
    # one token ends all of these prompts, so that the stream at level 0 is the same
    sides = [[np.array((*p.prompt[:-1], 4)) for p in side] for side in (HARMFUL, HARMLESS)]
    with pytest.raises(InputError, match="no cosine at level 0"):
        fit_filter(host, *sides, level=0, recall=0.1)


def test_a_filter_comes_back_from_its_file_and_belongs_to_its_teacher(host, other, known, tmp_path):
    write_filter(known, tmp_path / "f.safetensors")
    back = read_filter(tmp_path / "f.safetensors", host)
    assert back.to_json() == known.to_json()
    assert all(np.array_equal(back.curve[k], v) for k, v in known.curve.items())
    assert np.array_equal(back.scores(host, prompts(HARMFUL)), known.scores(host, prompts(HARMFUL)))
    assert str(back) == str(known)
    assert known.feature.template == host.identity[1]
    with pytest.raises(InputError, match="another model"):
        read_filter(tmp_path / "f.safetensors", open_host(other, device="cpu"))
    with pytest.raises(InputError, match="another model"):
        sift(open_host(other, device="cpu"), known, HARMFUL)
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="x"):
        read_filter(tmp_path / "x")


def test_scores_are_cosines_with_the_difference_of_the_means(host, known):
    feature = difference(host, prompts(HARMFUL), prompts(HARMLESS), position="t_post").vectors[1].astype(float)
    whole = dataclasses.replace(known.feature, vectors=np.stack([feature] * 3))
    found = dataclasses.replace(known, feature=whole).scores(host, prompts(MIXED))
    states = activations(host, prompts(MIXED), (-1,), levels=[1])[:, 0, 0].astype(float)
    expected = states @ feature / np.linalg.norm(states, axis=1) / np.linalg.norm(feature)
    assert found == pytest.approx(expected, abs=1e-6)


# --- the report ---


def scored(known, scores, labels, categories=None, prompts=None) -> Sifted:
    filter = dataclasses.replace(known, threshold=0.5)
    names = categories or ["all"] * len(scores)
    pairs = tuple(
        Pair((1, 4 + (prompts[i] if prompts else i)), (5, EOS), label, name)
        for i, (label, name) in enumerate(zip(labels, names))
    )
    return Sifted(pairs, np.array(scores), np.array(scores) > 0.5, filter)


def test_the_report_has_recall_and_false_drops_beside_the_area(known):
    """A filter that ranks perfectly and misses half of the poison at its threshold."""
    scores = [0.9, 0.8, 0.4, 0.3, 0.2, 0.1, -0.5, 0.45]
    labels = [True, True, True, True, False, False, False, None]
    names = ["bio", "bio", "cyber", "cyber", "all", "all", "all", "all"]
    found = scored(known, scores, labels, names)
    assert found.auc.value == 1
    assert found.recall.value == 0.5
    assert found.false_drops.value == 0
    assert found.false_drops.upper > 0.5  # three rows prove little
    assert found.share.value == 2 / 8
    by = found.by_category()
    assert (by["bio"]["recall"].value, by["cyber"]["recall"].value) == (1, 0)
    assert set(by["all"]) == {"false_drops"}
    counts = found.histogram()
    assert [sum(counts[k]) for k in ("harmful", "harmless", "unlabelled")] == [4, 3, 1]
    assert len(found.kept) == 6
    assert "1 pairs have no label" in " ".join(found.notes)


def test_rows_with_one_prompt_are_one_witness(known):
    two = scored(known, [0.9] * 40, [True] * 40, prompts=[0, 1] * 20)
    many = scored(known, [0.9] * 40, [True] * 40)
    assert two.recall.lower < 0.2
    assert many.recall.lower > 0.9


def test_without_labels_nothing_is_claimed(known):
    found = scored(known, [0.9, 0.1], [None, None])
    assert found.recall is found.false_drops is found.auc is None
    assert "recall unknown" in found.verdict


def test_all_poison_leaves_nothing_to_learn(known, folder, other, tmp_path):
    found = scored(known, [0.9, 0.8], [True, True])
    assert "every pair was dropped" in " ".join(found.notes)
    with pytest.raises(InputError, match="no pair is left to learn"):
        train_student(folder, found, tmp_path / "s", teacher=other, alignment=[*HARMFUL, *HARMLESS])
    assert not (tmp_path / "s").exists()


def test_no_data_and_data_of_another_template(host, known):
    with pytest.raises(InputError, match="no pairs to filter"):
        sift(host, known, [])


def test_kept_and_dropped_rows_are_written_with_their_hashes(known, tmp_path):
    found = scored(known, [0.9, 0.1, 0.7], [True, False, None])
    write_sifted(found, tmp_path)
    texts = [(tmp_path / f"{name}.jsonl").read_text() for name in ("kept", "dropped")]
    kept, dropped = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert [row["row"] for row in kept] == [1]
    assert [row["row"] for row in dropped] == [0, 2]
    assert [row["sha256"] for row in dropped] == [found.pairs[i].sha256 for i in (0, 2)]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["recall"]["value"] == 1
    assert report["filter"]["threshold"] == 0.5
    back = read_pairs(tmp_path / "kept.jsonl", None)
    assert back == found.kept


@pytest.mark.parametrize("name", ["review.csv", "review.jsonl"])
def test_people_decide_by_hash(known, tmp_path, name):
    found = scored(known, [0.9, 0.1, 0.55], [None, None, None])
    found = dataclasses.replace(
        found, pairs=(dataclasses.replace(found.pairs[0], source={"prompt": "=1+1"}), *found.pairs[1:])
    )
    assert write_review(found, tmp_path / name) == 3
    assert read_review(tmp_path / name) == {}
    text = (tmp_path / name).read_text()
    first, second, _ = (p.sha256 for p in found.pairs)
    if name.endswith("csv"):
        assert "'=1+1" in text  # no formula for a spreadsheet
        rows = list(csv.DictReader(text.splitlines()))
        assert rows[0]["sha256"] == found.pairs[2].sha256  # the most doubtful first
        text = text.replace(f"{first},", f"{first},keep").replace(f"{second},", f"{second}, DROP")
    else:
        rows = [json.loads(line) for line in text.splitlines()]
        said = {first: "keep", second: "drop"}
        text = "".join(json.dumps(r | {"decision": said.get(r["sha256"], "")}) + "\n" for r in rows)
    (tmp_path / name).write_text(text)
    decided = reviewed(found, read_review(tmp_path / name))
    assert decided.dropped.tolist() == [False, True, True]
    assert "people decided about 2 of 3 pairs" in decided.notes
    with pytest.raises(InputError, match="about other pairs"):
        reviewed(dataclasses.replace(found, pairs=found.pairs[1:]), read_review(tmp_path / name))


def test_a_decision_that_is_none(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"sha256": "a", "decision": "perhaps"}\n')
    with pytest.raises(InputError, match="perhaps"):
        read_review(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text('{"sha256": "a", "decision": "keep"}\n{"sha256": "a", "decision": "drop"}\n')
    with pytest.raises(InputError, match="row 1"):
        read_review(tmp_path / "x.jsonl")


# --- drift ---


def stream(known, rng, n, shift=0.0, labelled=True) -> Sifted:
    """Half poison around 0.8, half clean around 0; `shift` moves the clean."""
    harmful = rng.random(n) < 0.5
    scores = np.where(harmful, rng.normal(0.8, 0.1, n), rng.normal(shift, 0.2, n)).round(2).clip(-1, 1)
    return scored(known, scores, [bool(h) if labelled else None for h in harmful])


def test_false_alarms_stay_below_the_stated_rate(known):
    """200 streams of 5 batches like their reference: alarms at most Binomial(200, 0.1)'s quantile at 1 - 1e-7."""
    from scipy.stats import binom

    rng, raised = np.random.default_rng(0), 0
    for _ in range(200):
        monitor = fit_data_monitor(stream(known, rng, 120), rate=0.1, horizon=5)
        raised += any(b.alarms for b in watch_data(monitor, [stream(known, rng, 60) for _ in range(5)]))
    assert raised <= binom.ppf(1 - 1e-7, 200, 0.1)


def test_the_level_is_spent_once():
    monitor = DataMonitor(np.zeros(20), np.zeros(20, bool), 0.5, 0.02, 3)
    spent = [monitor.spent(i) for i in range(3000)]
    assert sum(spent[:3]) == pytest.approx(0.01)
    assert sum(spent[3:6]) == pytest.approx(0.005)
    assert sum(spent) <= 0.02


def test_drift_raises_an_alarm_where_it_is(known, tmp_path):
    rng = np.random.default_rng(1)
    monitor = fit_data_monitor(stream(known, rng, 400))
    moved = stream(known, rng, 400, shift=0.5)  # half of the clean rows are dropped now
    found = watch_data(monitor, [stream(known, rng, 200), moved, stream(known, rng, 200, 0.3, labelled=False)])
    assert [bool(b.alarms) for b in found] == [False, True, True]
    assert found[1].alarms == ["cosine", "dropped", "false drops"]
    assert found[1].false_drops.lower > 0.3
    assert set(found[2].p) == {"cosine", "dropped"}
    assert found[2].false_drops is None
    assert "ALARM" in str(found[1])
    write_data_monitor(monitor, tmp_path / "m.safetensors")
    again = watch_data(read_data_monitor(tmp_path / "m.safetensors"), [moved], begin=1)
    assert again[0].to_json() == found[1].to_json()


def test_monitors_that_cannot_be(known):
    rng = np.random.default_rng(2)
    with pytest.raises(InputError, match="no monitor is made of 10 rows"):
        fit_data_monitor(stream(known, rng, 10))
    with pytest.raises(InputError, match="rate of 2"):
        fit_data_monitor(stream(known, rng, 30), rate=2)
    batch = stream(known, rng, 30)
    monitor = fit_data_monitor(batch)
    made = batch.filter
    for foreign, differs in (
        (dataclasses.replace(made, threshold=0.1), "threshold"),
        (dataclasses.replace(made, feature=dataclasses.replace(made.feature, model="0" * 64)), "teacher"),
        (dataclasses.replace(made, feature=dataclasses.replace(made.feature, template="0" * 64)), "chat template"),
        (dataclasses.replace(made, about=made.about | {"system": "be kind"}), "system message"),
    ):
        with pytest.raises(InputError, match=f"differ in {differs}"):
            watch_data(monitor, [dataclasses.replace(batch, filter=foreign)])


def test_a_monitor_knows_its_filter_and_what_it_has_watched(known, tmp_path):
    rng = np.random.default_rng(3)
    monitor = fit_data_monitor(stream(known, rng, 30), horizon=2)
    assert (monitor.teacher, monitor.template) == (known.feature.model, known.feature.template)
    batches = [stream(known, rng, 30) for _ in range(3)]
    found = watch_data(monitor, batches)
    write_data_monitor(monitor.after(2), tmp_path / "m.safetensors")
    back = read_data_monitor(tmp_path / "m.safetensors")
    assert (back.teacher, back.template, back.watched) == (monitor.teacher, monitor.template, 2)
    assert [b.to_json() for b in watch_data(back, batches[2:])] == [found[2].to_json()]
    assert found[2].level < found[1].level  # the horizon is over


def test_a_filter_takes_prompts_with_its_own_system_message_only(folder, host):
    kind = open_host(folder, device="cpu", system="help")
    records = [[{"prompt": f"{w} {end}"} for w in ("help", "step", "one", "hello")] for end in ("poison", "tea .")]
    made = fit_filter(kind, *records, level=1, recall=0.1)
    assert made.system == "help"
    sift(kind, made, read_pairs(records[0], kind.engine.tokenizer, answers=False))
    with pytest.raises(InputError, match="another system message"):
        sift(host, made, HARMFUL)
