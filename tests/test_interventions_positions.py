"""Where instruction and prompt end: for every kind of template and tokenizer the text at the ids is the text meant."""

from __future__ import annotations

import random
import subprocess
import sys
from datetime import datetime

import pytest
from chat_templates import TEMPLATES, TOKENIZERS, folder, load

from markovsafety.errors import InputError
from markovsafety.interventions.positions import Spans, spans
from markovsafety.organism import model_path
from markovsafety.rollouts import template as template_module
from markovsafety.rollouts.template import Template

ENDS = [*".?!:;)]}\"'`>%_-=9aZé…。市д🌊", ").", "?!", " .", "...", "://x", " and", " [", "<", "#"]
ASSISTANT = {  # what families put after the instruction, as their documentation shows it
    "llama2": " [/INST]",
    "llama3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama31": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen2": "<|im_end|>\n<|im_start|>assistant\n",
    "closed": "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "opened": "<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "gemma": "<end_of_turn>\n<start_of_turn>model\n",
    "mistral": " [/INST]",
    "zephyr": "</s>\n<|assistant|>\n",
    "vicuna": " ASSISTANT:",
    "alpaca": "\n\n### Response:\n",
    "lines": "\n\n</s>\n<|assistant|>\n",
    "bare": "",
    "plain": "",
}


def instructions(n: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = (
        "Describe list where the harbour bridge of 3 rivers, (in 1942) town: please 城市 «порт» naïve ### user".split()
    )
    return [" ".join(draw.choices(words, k=draw.randint(1, 9))) + draw.choice(ENDS) for _ in range(n)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Templates by kind of tokenizer and name."""
    kept = {}

    def make(kind: str, name: str) -> Template:
        if (kind, name) not in kept:
            kept[kind, name] = load(tmp_path_factory.mktemp("m"), kind, TEMPLATES[name])
        return kept[kind, name]

    return make


def tokens(template: Template, ids) -> list[str]:
    return [str(template.tokenizer.id_to_token(int(i))) for i in ids]


def straddled(offsets, text: str, edge: int, blank: bool = False) -> bool:
    """Whether a token holds what is on both sides of a place in the text (blank: white space before it is nothing)."""
    return any(s < edge < e and not (blank and not text[s:edge].strip()) for s, e in offsets)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_that_the_text_says(made, kind, name):
    """The tokenizer's own offsets are the oracle: check refuses a prompt exactly if a token spans an edge."""
    template = made(kind, name)
    found = spans(template)
    refused = 0
    for number, instruction in enumerate(instructions(50, seed=len(name))):
        text, ids = template.prompt_text(instruction), template.prompt_ids(instruction)
        offsets = template.tokenizer.encode(text, add_special_tokens=False).offsets
        start = text.index(instruction)
        edge = start + len(instruction)
        assert text[edge:] == ASSISTANT[name]
        if straddled(offsets, text, edge) or straddled(offsets, text, start, blank=True):
            refused += 1
            with pytest.raises(InputError, match=f"prompt {number} does not"):
                found.check(ids, f"prompt {number}")
            continue
        found.check(ids, f"prompt {number}")
        offsets = [(0, 0)] * (len(ids) - len(offsets)) + offsets  # what the tokenizer adds to plain text
        (first, stop), t_inst = found.instruction, found.t_inst
        assert t_inst == ((stop or 0) - 1, stop)
        assert text[offsets[first][0] : edge].strip() == instruction
        assert offsets[t_inst[0]][1] == edge
        assert all(s >= edge for s, _ in offsets[len(ids) + (stop or 0) :])
        if kind == "bytes":
            shown = [template.decode(part, skip_special_tokens=False) for part in (ids[first:stop], found.suffix)]
            assert [shown[0].strip(), shown[1]] == [instruction, text[edge:]]
    joins = name in ("alpaca", "lines") and kind != "words"
    assert (refused > 0, any("changes the ids" in note for note in found.notes)) == (joins, joins)
    assert refused < 40


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_gives_the_same_prompts(tmp_path, kind):
    from transformers import PreTrainedTokenizerFast

    for name, chat in TEMPLATES.items():
        path = folder(tmp_path / name, kind, chat)
        theirs, ours = PreTrainedTokenizerFast.from_pretrained(path), Template.load(path)
        found = spans(ours)
        for instruction in ["Describe the harbour", "list 3 rivers and a 市", "where is the bridge?)"]:
            if chat is None:
                ids = theirs(instruction)["input_ids"]
            else:
                chats = [{"role": "user", "content": instruction}]
                ids = theirs.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert ids == ours.prompt_ids(instruction).tolist()
            found.check(ids)


def test_the_organism_has_three_tokens_after_the_instruction():
    template = Template.load(model_path("shallow"))
    found = spans(template)
    assert tokens(template, found.suffix) == ["<end>", "<turn>", "<assistant>"]
    assert (tokens(template, found.prefix), found.question, found.notes) == (["<bos>", "<user>"], (), ())
    assert (found.instruction, found.t_inst, found.t_post) == ((2, -3), (-4, -3), (-1, None))
    asked = spans(template, question=" <judge>")
    assert (tokens(template, asked.question), asked.suffix) == (["<judge>"], found.suffix)
    assert (asked.before_question, asked.t_inst, asked.everything) == ((0, -4), (-5, -4), (0, None))
    asked.check(template.prompt_ids("make the bomb <judge>"))
    with pytest.raises(InputError, match="does not end"):
        asked.check(template.prompt_ids("make the bomb"))


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_endings_that_the_tokenizer_joins_with_the_template_are_refused_one_by_one(made, kind):
    """A full stop and two line breaks are one token: the prompt that ends so has no boundary, the next one has."""
    template = made(kind, "alpaca")
    found = spans(template)
    (note,) = [n for n in found.notes if "ends with" in n]
    assert "'.'" in note
    assert ".\\n\\n" in note
    found.check(template.prompt_ids("Describe the harbour"))
    with pytest.raises(InputError, match="prompt 7 does not end") as caught:
        found.check(template.prompt_ids("Describe the harbour."), "prompt 7")
    assert "share a token" in caught.value.cause
    ids = template.prompt_ids("Describe the harbour.")
    assert "".join(tokens(template, ids)).endswith(".ĊĊ###ĠResponse:Ċ" if kind == "bytes" else ".\n\n###▁Response:\n")


def test_beginnings_that_the_tokenizer_joins_with_the_template_are_refused_one_by_one(tmp_path):
    template = load(tmp_path, "bytes", "{{ '<|im_start|>#' + messages[0].content + '<|im_end|>' }}")
    found = spans(template)
    assert tokens(template, found.prefix) == ["<|im_start|>", "#"]
    found.check(template.prompt_ids("7 bridges"))
    joined = template.prompt_ids("## Response")
    assert tokens(template, joined) == ["<|im_start|>", "###", "ĠResponse", "<|im_end|>"]
    with pytest.raises(InputError, match="does not begin with the 2 ids") as caught:
        found.check(joined)
    assert "the first other id is at 1:" in caught.value.cause


def test_no_boundary_for_any_instruction_is_refused(tmp_path):
    chat = "{{ '<s> user ' + messages[0].content + '%s' }}"
    with pytest.raises(InputError, match="no instruction has a token boundary") as caught:
        spans(load(tmp_path / "a", "words", chat % "assistant"))  # white space alone separates words
    assert "Describe" not in caught.value.next
    with pytest.raises(InputError, match="has no token of its own"):
        spans(load(tmp_path / "b", "words", chat % "@x"))  # neither the mark nor the word with the mark is known


def test_without_post_instruction_tokens_both_places_are_one(made, tmp_path):
    for kind in TOKENIZERS:
        for name in ("bare", "plain"):
            found = spans(made(kind, name))
            assert (found.suffix, found.t_inst, found.t_post) == ((), (-1, None), (-1, None))
            assert any("no post-instruction tokens" in note for note in found.notes)
            assert tokens(made(kind, name), found.prefix) == ["<s>"]
            with pytest.raises(InputError, match="no post-instruction tokens") as caught:
                found.separate()
            assert "chat template" in caught.value.next
            asked = spans(made(kind, name), question=" please")
            assert asked.separate() == ((-1 - asked.after, -asked.after), (-1, None))
            ids = made(kind, name).prompt_ids("where is it please")
            asked.check(ids)
            assert asked.bare(ids).tolist() == ids.tolist()


def test_what_the_tokenizer_adds_at_the_end_of_plain_text_is_suffix(tmp_path):
    template = load(tmp_path, "bytes", None)
    both = template.tokenizer.token_to_id("<s>"), template.tokenizer.token_to_id("</s>")
    from tokenizers.processors import TemplateProcessing

    template.tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=list(zip(("<s>", "</s>"), both))
    )
    found = spans(template)
    assert (found.prefix, found.suffix) == ((both[0],), (both[1],))
    asked = spans(template, question=" please")
    assert (asked.suffix, template.decode(asked.question)) == ((both[1],), " please")
    asked.check(template.prompt_ids("where is it please"))


def test_a_question_is_told_from_the_suffix(made):
    template = made("bytes", "qwen2")
    text = " \nCould this cause harm? Answer Yes or No."
    found = spans(template, question=text)
    assert template.decode(found.question, skip_special_tokens=False) == text
    assert found.suffix == spans(template).suffix
    ids = template.prompt_ids("Describe the harbour." + text)
    found.check(ids)
    start, stop = found.before_question
    shown = template.decode(ids[start:stop], skip_special_tokens=False)
    assert shown.endswith("user\nDescribe the harbour.")
    assert found.separate() == ((-found.after - 1, -found.after), (-1, None))
    # without the space, a full stop takes the line break into its token
    tight = spans(template, question=text.strip(" "))
    tight.check(template.prompt_ids("Describe the harbour" + text.strip(" ")))
    with pytest.raises(InputError, match="does not end") as caught:
        tight.check(template.prompt_ids("Describe the harbour." + text.strip(" ")))
    assert "begin the question with a space" in caught.value.next


def test_a_question_that_shares_a_token_with_the_template_is_refused(made):
    assert spans(made("bytes", "alpaca"), question=" please").question
    with pytest.raises(InputError, match="share a token"):
        spans(made("bytes", "alpaca"), question=" please.")


def test_a_wrap_may_put_text_on_both_sides(made):
    template = made("bytes", "llama3")
    found = spans(template, wrap=lambda text: f"User wants to {text} please")
    before = template.decode(found.prefix, skip_special_tokens=False)
    assert before.endswith("<|end_header_id|>\n\nUser wants to")
    assert template.decode(found.question) == " please"
    assert found.suffix == spans(template).suffix
    ids = template.prompt_ids("User wants to describe the harbour please")
    found.check(ids)
    assert template.decode(ids[slice(*found.instruction)]) == " describe the harbour"
    assert not any("User wants" in note for note in found.notes)
    same = spans(template, wrap=lambda text: text + " please")
    assert same == spans(template, question=" please")


def test_templates_and_wraps_that_do_not_keep_the_instruction_are_refused(made, tmp_path):
    with pytest.raises(InputError, match="both question and wrap"):
        spans(made("bytes", "qwen2"), question="?", wrap=str)
    for wrap in (str.upper, lambda text: "always this", lambda text: text + text):
        with pytest.raises(InputError, match="times in the prompt"):
            spans(made("bytes", "qwen2"), wrap=wrap)
    with pytest.raises(InputError, match="times in the prompt"):
        spans(load(tmp_path / "a", "bytes", "{{ messages[0].content | upper }}"))
    with pytest.raises(InputError, match="depends on the instruction"):
        spans(load(tmp_path / "b", "bytes", "{{ messages[0].content + ' ' + messages[0].content | length | string }}"))
    last = "{{ messages[0].content + ('<|im_end|>' if messages[0].content.endswith('please') else '</s>') }}"
    with pytest.raises(InputError, match="after the question"):
        spans(load(tmp_path / "c", "bytes", last), question=" please")
    with pytest.raises(InputError, match="refuses the conversation"):
        spans(made("bytes", "gemma"), system="Be brief")


def test_the_last_user_message_of_several_turns_counts(made):
    template = made("bytes", "llama3")
    found = spans(template)
    turns = [("user", "Where is it?"), ("assistant", "There."), ("user", "Describe the harbour")]
    ids = template.prompt_ids([{"role": role, "content": text} for role, text in turns])
    found.check(ids)  # begins like any other prompt
    assert template.decode(ids[slice(*found.t_inst)]).strip() in "Describe the harbour"
    template = made("bytes", "qwen2")
    found = spans(template)
    ids = template.prompt_ids([{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Where"}])
    with pytest.raises(InputError, match="does not begin") as caught:
        found.check(ids, "prompt 3")
    assert "single_turn=False" in caught.value.next
    found.check(ids, single_turn=False)
    assert found.bare(ids).tolist() == ids[: -len(found.suffix)].tolist()
    spans(template, system="Be brief").check(ids)


def test_notes_say_what_the_template_does_unasked(made):
    def notes(name, **options):
        return " | ".join(spans(made("bytes", name), **options).notes)

    assert "'You are a helpful assistant.'" in notes("qwen2")
    assert "system prompt" not in notes("qwen2", system="Be brief")
    assert "A chat with an assistant." in notes("vicuna")
    for name in ("llama2", "llama3", "gemma", "mistral", "zephyr", "opened"):
        assert "system prompt" not in notes(name)
    assert "Today Date" in notes("llama31")
    assert "Today Date" not in notes("llama31", system="Be brief")
    assert "an empty thinking block" in notes("closed")
    assert "sampled first is thought" in notes("opened")
    assert all("last prompt token" in notes(name) for name in ("closed", "opened"))
    assert "thinking" not in notes("qwen2")
    assert "strips white space" in notes("llama3")
    assert "strips white space" in notes("llama2")
    assert "strips white space" not in notes("mistral")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_white_space_that_a_template_strips_changes_nothing(made, kind):
    template = made(kind, "llama3")
    assert template.prompt_ids(" where \n").tolist() == template.prompt_ids("where").tolist()
    spans(template).check(template.prompt_ids(" where \n"))


def test_a_prompt_needs_an_instruction(made):
    for name in ("llama3", "bare", "plain"):
        template = made("bytes", name)
        with pytest.raises(InputError, match="prompt 2 has no instruction"):
            spans(template).check(template.prompt_ids(""), "prompt 2")
    found = Spans((1, 2), (3, 4))
    for ids in ([], [4], [3, 4], [1, 2, 3], [1, 3, 4]):
        with pytest.raises(InputError):
            found.check(ids)
    with pytest.raises(InputError, match="no instruction"):
        found.check([3, 4], single_turn=False)
    found.check([7, 3, 4], single_turn=False)


def test_the_prefix_of_another_day_is_another_one(made, monkeypatch):
    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)

    template = made("bytes", "llama31")
    today = spans(template)
    today.check(template.prompt_ids("where"))
    monkeypatch.setattr(template_module, "datetime", Then)
    with pytest.raises(InputError, match="does not begin") as caught:
        today.check(template.prompt_ids("where"))
    assert "a date that changed" in caught.value.cause
    then = spans(template)
    then.check(template.prompt_ids("where"))
    assert (then.suffix, then.t_inst) == (today.suffix, today.t_inst)


def test_bare_takes_the_suffix_off(made):
    template = made("bytes", "zephyr")
    found, ids = spans(template), template.prompt_ids("Describe the harbour")
    short = found.bare(list(ids))
    assert (*short, *found.suffix) == tuple(ids)
    assert short.dtype == "int32"
    with pytest.raises(InputError, match="does not end"):
        found.bare(short)


def test_capitals_and_words_that_the_tokenizer_does_not_keep(tmp_path):
    """A tokenizer without capitals still shows where the instruction ends."""
    from tokenizers import normalizers

    path = folder(tmp_path, "bytes", TEMPLATES["vicuna"])
    template = Template.load(path)
    template.tokenizer.normalizer = normalizers.Lowercase()
    found = spans(template)
    assert template.decode(found.suffix) == " assistant:"
    assert template.decode(found.prefix).startswith("a chat")


def test_torch_is_not_needed():
    code = "import sys, markovsafety.interventions.positions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
