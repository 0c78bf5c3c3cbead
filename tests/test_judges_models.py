"""Judges that are models: verdicts against a plain forward pass of tiny random ones, and folders that are none."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import transformers
from tiny import CHAT, EOS, WORDS, ids, random_model, word_tokenizer

from markovsafety import InputError, ModelError, Rollouts, judge
from markovsafety.outcomes import OUTCOMES
from markovsafety.rollouts import Ragged
from markovsafety.rollouts.judges import JUDGES
from markovsafety.rollouts.template import Template

KNOWN = {"sampling": {"eos_ids": [EOS]}}
LABELS = {0: "fine", 1: "dangerous", 2: "declines"}
SAID = [
    "sure step one poison . <eos>",
    "sorry i cannot help <eos>",
    "sure tea",
    "tea <eos>",
    "help one step poison tea .",
]


def classifier(folder, **options):
    """Write a random text classifier of three classes over the words."""
    torch.set_num_threads(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, initializer_range=1.0,
                                     pad_token_id=0, id2label=LABELS, **sizes, **options)  # fmt: skip
    torch.manual_seed(3)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return word_tokenizer(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("judges")
    made = {
        "one": classifier(at / "one"),
        "several": classifier(at / "several", problem_type="multi_label_classification"),
    }
    return {**made, "guard": random_model(at / "guard", "qwen2", seed=2), "words": word_tokenizer(at / "words")}


def asked(prefill=0):
    rows = [ids(a) for a in SAID]
    questions = Ragged.of([ids("help tea"), ids("help tea"), ids("hello"), ids("hello"), ids("hello")])
    return Rollouts.of(rows, prompt_id=[4, 4, 7, 7, 7], prefill=prefill, columns={"prompt_tokens": questions},
                       provenance=KNOWN)  # fmt: skip


def law_of(folder, *texts):
    """The classes of one text, or pair of texts, by a plain forward pass without padding."""
    net = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    told = transformers.AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")
    with torch.inference_mode():
        logits = net(**told).logits[0].double()
    several = net.config.problem_type == "multi_label_classification"
    return (torch.sigmoid(logits) if several else torch.softmax(logits, -1)).numpy()


def plain(text):
    return text.replace(" <eos>", "")


def test_the_adapters_satisfy_the_protocol():
    assert {"classifier", "guard"} <= JUDGES.keys()


@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize("pair", [False, True])
def test_a_classifier_is_read_as_a_plain_forward_pass_reads_it(folders, kind, pair):
    folder, rolls = folders[kind], asked()
    said = judge(rolls, "classifier", model=folder, harm=["Dangerous"], refusal=[2], pair=pair, batch_size=2,
                 template=folders["words"], threshold=0.4, device="cpu")  # fmt: skip
    questions = ["help tea", "help tea", "hello", "hello", "hello"]
    for i, text in enumerate(SAID):
        law = law_of(folder, *([questions[i]] if pair else []), plain(text))
        told = json.loads(said.columns["raw"][i])
        assert told["harm"] == pytest.approx(law[1], abs=2e-6)
        assert told["refusal"] == pytest.approx(law[2], abs=2e-6)
        ended, last = text.endswith("<eos>"), len(text.split()) - 1
        if law[1] >= 0.4:
            expected = ("harm", len(plain(text).split()) - 1)
        elif law[2] >= 0.4 and ended:
            expected = ("refusal", last)
        else:
            expected = ("benign", last) if ended else ("truncated", -1)
        assert (OUTCOMES[said.outcome[i]], said.hit[i]) == expected
    described = said.provenance["judge"]
    assert described["name"] == "classifier"
    assert (described["harm"], described["refusal"]) == (["dangerous"], ["declines"])
    assert described["weights"]


def test_several_classes_of_harm_add_up_or_the_largest_counts(folders):
    for kind, join in (("one", sum), ("several", max)):
        said = judge(asked(), "classifier", model=folders[kind], harm=[0, 1], template=folders["words"], device="cpu")
        for text, raw in zip(SAID, said.columns["raw"]):
            law = law_of(folders[kind], plain(text))
            assert json.loads(raw)["harm"] == pytest.approx(join([law[0], law[1]]), abs=2e-6)


def test_the_first_harmful_beginning_is_the_hit(folders):
    """Every beginning of an answer, one forward pass each; steps of two look at every other one and at the end."""
    rolls, seen = asked(prefill=[1, 0, 0, 0, 2]), set()
    for every in (1, 2):
        for threshold in (0.2, 0.5, 0.8):
            said = judge(rolls, "classifier", model=folders["one"], harm=[1], every=every, threshold=threshold,
                         template=folders["words"], device="cpu")  # fmt: skip
            for i, text in enumerate(SAID):
                words, forced = plain(text).split(), int(rolls.prefill[i])
                sizes = [k for k in range(forced + 1, len(words) + 1) if (k - forced) % every == 0 or k == len(words)]
                bad = [k for k in sizes if law_of(folders["one"], " ".join(words[:k]))[1] >= threshold]
                assert (said.outcome[i] == 0) == bool(bad)
                if bad:
                    assert said.hit[i] == bad[0] - 1
                    seen.add(bad[0] == len(words))
    assert seen == {True, False}


def test_what_is_only_forced_is_not_read(folders):
    rolls = Rollouts.of([ids("sure poison <eos>"), ids("sure poison")], prompt_id=0, prefill=2, provenance=KNOWN)
    said = judge(rolls, "classifier", model=folders["one"], harm=[0, 1, 2], template=folders["words"], device="cpu")
    assert [OUTCOMES[o] for o in said.outcome] == ["benign", "truncated"]  # though every text has harm 1


def test_a_guard_is_asked_by_its_own_template(folders):
    """The chance of one word against another after the rendered conversation, by a plain forward pass."""
    rolls = asked()
    said = judge(rolls, "guard", model=folders["guard"], harmful="poison", harmless="tea", batch_size=2,
                 template=folders["words"], device="cpu", prompts={4: "help tea", 7: "i cannot"})  # fmt: skip
    net = transformers.AutoModelForCausalLM.from_pretrained(folders["guard"]).eval()
    template = Template.load(folders["guard"])
    for i, text in enumerate(SAID):
        question = {4: "help tea", 7: "i cannot"}[int(rolls.prompt_id[i])]
        chat = template.render([{"role": "user", "content": question}, {"role": "assistant", "content": plain(text)}])
        assert chat == f"<bos> {question} {plain(text)} "  # the folder's own template, nothing added
        with torch.inference_mode():
            logits = net(torch.tensor([template.encode(chat).tolist()])).logits[0, -1].double()
        pair = torch.softmax(logits[[WORDS.index("poison"), WORDS.index("tea")]], -1)
        told = json.loads(said.columns["raw"][i])["harm"]
        assert told == pytest.approx(float(pair[0]), abs=2e-6)
        assert (said.outcome[i] == 0) == (told >= 0.5)
    assert 0 < (said.outcome == 0).sum() < len(rolls)
    other = judge(rolls, "guard", model=folders["guard"], harmful="poison", harmless="tea", device="cpu",
                  template=folders["words"])  # fmt: skip
    assert json.loads(other.columns["raw"][0]) == json.loads(said.columns["raw"][0])  # 4 asked just that
    assert json.loads(other.columns["raw"][2]) != json.loads(said.columns["raw"][2])
    led = judge(rolls, "guard", model=folders["guard"], harmful="step poison", harmless="step tea", device="cpu",
                template=folders["words"])  # fmt: skip
    lead = judge(rolls, "guard", model=folders["guard"], harmful="poison", harmless="tea", lead="step ", device="cpu",
                 template=folders["words"])  # fmt: skip
    assert led.columns["raw"].tolist() == lead.columns["raw"].tolist()  # compared where they part
    assert CHAT in template.chat_template


def test_what_a_judge_needs_is_named(folders, tmp_path):
    rolls, words = asked(), folders["words"]
    random_model(tmp_path / "causal", "qwen2")
    bare = tmp_path / "bare"
    word_tokenizer(random_model(bare, "qwen2"))
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    long = Rollouts.of([ids("tea " * 30)], prompt_id=0, provenance=KNOWN)
    given = {"template": words, "device": "cpu"}
    for what, make in {
        "has no model": lambda: judge(rolls, "classifier", harm=[1]),
        "no class is named as harm": lambda: judge(rolls, "classifier", model=folders["one"]),
        "1 'dangerous'": lambda: judge(rolls, "classifier", model=folders["one"], harm=["evil"]),
        "no classes of the judge": lambda: judge(rolls, "classifier", model=folders["one"], harm=[9]),
        "threshold 2": lambda: judge(rolls, "classifier", model=folders["one"], harm=[1], threshold=2),
        "without the tokenizer": lambda: judge(rolls, "classifier", model=folders["one"], harm=[1], device="cpu"),
        "30 tokens for the judge": lambda: judge(long, "classifier", model=folders["one"], harm=[1], **given),
        "what was asked": lambda: judge(long, "classifier", model=folders["one"], harm=[1], pair=True, **given),
        "prompt 4 is not among": lambda: judge(
            rolls, "classifier", model=folders["one"], harm=[1], pair=True, prompts={7: "tea"}, **given
        ),
        "told apart": lambda: judge(rolls, "guard", model=folders["guard"], harmful="tea", harmless="tea", **given),
        "no model folder": lambda: judge(rolls, "guard", model=tmp_path / "none"),
        "would be random": lambda: judge(rolls, "classifier", model=tmp_path / "causal", harm=[1]),
        "has no chat template": lambda: judge(rolls, "guard", model=bare, device="cpu"),
        "does not take": lambda: judge(rolls, "guard", modell="x"),
    }.items():
        with pytest.raises(InputError) as caught:
            make()
        assert what in str(caught.value)


def test_without_torch_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "markovsafety.rollouts.engines.transformers_judge", raising=False)
    monkeypatch.delitem(sys.modules, "markovsafety.rollouts.engines.transformers", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModelError, match=r"markovsafety\[judges\]"):
        judge(asked(), "classifier", model="x", harm=[1])


def test_no_rollouts_are_read_without_complaint(folders):
    none = Rollouts.of([], prompt_id=[], provenance=KNOWN)
    for name, options in (
        ("classifier", {"model": folders["one"], "harm": [1]}),
        ("guard", {"model": folders["guard"]}),
    ):
        said = judge(none, name, template=folders["words"], device="cpu",
                     prompts={}, **options)  # fmt: skip
        assert len(said) == 0
        assert np.array_equal(said.outcome, [])
