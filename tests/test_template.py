"""Prompt ids equal those of transformers, for every way a folder can keep its template; and what ends a turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from markovsafety.errors import InputError, ModelError
from markovsafety.rollouts.template import Template

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<end>", "<turn>", "<assistant>"]
WORDS = ["please", "tell", "me", "the", "plan", "sure", "here", "it", "is", ".", "You", "help"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role']=='user' %} <user> {{ m['content'] }} <end> <turn> "
    "{% elif m['role']=='assistant' %}<assistant> {{ m['content'] }}{{ eos_token }}{% else %}"
    "{{ raise_exception('no ' + m['role'] + ' here') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BLOCKS = """{%- set ns = namespace(first=true) -%}
{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif -%}
{%- for m in messages %}
    {%- if m.content is not defined %}{% continue %}{% endif %}
    {%- if m.role == 'assistant' %}
{% generation %}<assistant> {{ m.content | trim }} <end>{% endgeneration %}
    {%- else %}
<user> {{ m.content | trim }} {{ {'a': m.role} | tojson | length }} <end>
    {%- endif %}
    {% if ns.first and strftime_now('%Y') | int > 2000 %}
        {% set ns.first = false %}
        <turn>
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %} <assistant>{% endif %}"""
CHATS = [
    [{"role": "user", "content": "please tell me the plan ."}],
    [
        {"role": "user", "content": "tell me"},
        {"role": "assistant", "content": " sure here it is "},
        {"role": "user", "content": "<end> the plan", "name": None},
    ],
]


def build(folder: Path, chat=CHAT, *, bos: bool = False, how: str = "config", **settings_) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    config |= {"unk_token": "<unk>", "pad_token": {"content": "<pad>", "__type": "AddedToken"}} | settings_
    match how:
        case "config":
            config |= {"chat_template": chat} if chat is not None else {}
        case "list":
            config["chat_template"] = [{"name": "tool", "template": "x"}, {"name": "default", "template": chat}]
        case "dict":
            config["chat_template"] = {"tool": "x", "default": chat}
        case "jinja":
            config["chat_template"] = "never read"
            (folder / "chat_template.jinja").write_text(chat)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def theirs(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("how", ["config", "list", "jinja"])
@pytest.mark.parametrize("chat", [CHAT, BLOCKS])
def test_ids_are_those_of_transformers(tmp_path, chat, how):
    folder = build(tmp_path / "m", chat, how=how)
    template = Template.load(folder)
    other = theirs(folder)
    assert template.kind == "chat"
    for messages in CHATS:
        expected = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, truncation=False)
        assert template.prompt_ids(messages).tolist() == list(expected)
        text = other.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert template.render(messages) == text
    one = template.prompt_ids(CHATS[0][0]["content"])
    assert one.tolist() == template.prompt_ids(CHATS[0]).tolist()
    assert one.dtype == "int32"


def test_named_templates_in_a_dict(tmp_path):
    """The spelling transformers no longer writes."""
    one, other = build(tmp_path / "a", how="dict"), build(tmp_path / "b")
    assert Template.load(one).prompt_ids("tell me").tolist() == Template.load(other).prompt_ids("tell me").tolist()
    config = json.loads((one / "tokenizer_config.json").read_text())
    del config["chat_template"]["default"]
    (one / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="none of them 'default'"):
        Template.load(one)


def test_the_sandbox_holds(tmp_path):
    template = Template.load(build(tmp_path / "m", "{{ messages.append(1) }}"))
    with pytest.raises(InputError, match="refuses the conversation"):
        template.prompt_ids("tell me")
    template = Template.load(build(tmp_path / "m", "{{ ''.__class__.__mro__ }}"))
    with pytest.raises(InputError, match="refuses the conversation"):
        template.prompt_ids("tell me")


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8))
def test_words_come_back(shared, words):
    assert shared.decode(shared.encode(" ".join(words))) == " ".join(words)
    ids = shared.prompt_ids(" ".join(words)).tolist()
    assert ids == [1, 4, *(8 + WORDS.index(w) for w in words), 5, 6, 7]
    assert shared.decode(ids) == " ".join(words)
    assert shared.decode(ids, skip_special_tokens=False).startswith("<bos> <user>")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Template.load(build(tmp_path_factory.mktemp("shared") / "m"))


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_gets_the_tokens_the_tokenizer_adds(tmp_path, bos):
    folder = build(tmp_path / "m", None, bos=bos)
    template = Template.load(folder)
    ids = template.prompt_ids("tell me").tolist()
    assert template.kind == "plain"
    assert ids == theirs(folder)("tell me", truncation=False, padding=False)["input_ids"]
    assert ids == ([1, 9, 10] if bos else [9, 10])
    for prompt, system in ((CHATS[0], None), ("tell me", "help")):
        with pytest.raises(InputError, match="no chat template"):
            template.prompt_ids(prompt, system)


def test_system_messages_and_what_a_template_refuses(tmp_path):
    template = Template.load(build(tmp_path / "a"))
    with pytest.raises(InputError, match="refuses the conversation") as caught:
        template.prompt_ids("tell me", system="You help")
    assert "no system here" in caught.value.cause
    with pytest.raises(InputError, match="conversation is empty"):
        template.prompt_ids([])
    folder = build(tmp_path / "b", BLOCKS)
    chat = [{"role": "system", "content": "You help"}, *CHATS[0]]
    expected = theirs(folder).apply_chat_template(chat, add_generation_prompt=True, return_dict=False, truncation=False)
    template = Template.load(folder)
    assert template.prompt_ids(CHATS[0], system="You help").tolist() == list(expected)


def test_training_answers_end_as_the_template_ends_them(tmp_path):
    """Not with the smallest of the end ids: Qwen's <|endoftext|> is smaller than its <|im_end|>."""
    assert Template.load(build(tmp_path / "m", BLOCKS)).answer_end == (5,)
    assert Template.load(build(tmp_path / "n", None)).answer_end == (2,)


def test_what_ends_an_answer(tmp_path):
    folder = build(tmp_path / "m", BLOCKS)
    assert Template.load(folder).eos_ids == (2,)
    assert Template.load(folder).end_ids == (2, 5)  # <end> follows the assistant's words
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 6}))
    assert Template.load(folder).eos_ids == (2, 6)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    assert Template.load(folder).eos_ids == (2, 3, 7)
    assert Template.load(build(tmp_path / "n", None)).end_ids == (2,)
    assert Template.load(build(tmp_path / "c")).end_ids == (2,)


def test_tokens_that_only_the_settings_know(tmp_path):
    new = {str(20 + i): {"content": f"<new{i}>", "special": True} for i in range(2)}
    folder = build(tmp_path / "m", "{{ bos_token }} <new1> " + CHAT, added_tokens_decoder=new)
    template = Template.load(folder)
    assert template.vocab_size == 22
    ids = theirs(folder).apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=False, truncation=False)
    assert template.prompt_ids(CHATS[0]).tolist() == list(ids)
    assert 21 in template.prompt_ids(CHATS[0])


def test_hashes_and_broken_files(tmp_path):
    folder = build(tmp_path / "m")
    template = Template.load(folder)
    assert template.hashes() == Template.load(build(tmp_path / "n", how="jinja")).hashes()
    assert Template.load(build(tmp_path / "o", BLOCKS)).hashes()["template"] != template.hashes()["template"]
    assert Template.load(build(tmp_path / "p", None)).hashes()["template"] is None
    with pytest.raises(ModelError, match="ids up to 19, the model a vocabulary of 19"):
        Template.load(folder, 19)
    (folder / "config.json").write_text('{"vocab_size": 10}')
    with pytest.raises(ModelError, match="a vocabulary of 10"):
        Template.load(folder)
    for name, content in {"tokenizer_config.json": "{", "config.json": "[1]"}.items():
        (folder / name).write_text(content)
        with pytest.raises(ModelError, match=name):
            Template.load(folder)
        (folder / name).write_text("{}")


def test_pieces_that_become_the_unknown_token(tmp_path):
    template = Template.load(build(tmp_path / "m"))
    assert template.unknown("please zebra me <unk> qu\u00e4ntum") == [(1, "zebra"), (4, "qu\u00e4ntum")]
    assert template.unknown("please tell me") == []
    assert Template.load(byte_tokenizer(tmp_path / "b")).unknown("zebra qu\u00e4ntum") == []


@pytest.mark.parametrize("chat", [CHAT, None])
@pytest.mark.parametrize("prompt", [5, None, {"role": "user"}, [1], ["a", "b"], b"tell"])
def test_prompts_that_are_no_text_and_no_conversation(tmp_path, chat, prompt):
    with pytest.raises(InputError):
        Template.load(build(tmp_path / "m", chat)).prompt_ids(prompt)


def test_the_template_behind_rollouts_is_theirs_or_refused():
    from markovsafety.organism import model_path
    from markovsafety.rollouts.template import behind

    folder = str(model_path("shallow"))
    own = Template.load(folder).hashes()["tokenizer"]
    assert behind({"model": {"path": folder}, "template": {"tokenizer": own}}, "f", "n").hashes()["tokenizer"] == own
    with pytest.raises(InputError, match="not the one that these rollouts came from"):
        behind({"model": {"path": folder}, "template": {"tokenizer": "another"}}, "f", "n")
    with pytest.raises(InputError, match="no folder known"):
        behind({}, "no folder known", "n")
