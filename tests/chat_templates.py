"""Chat templates in the manner of published model families, and three kinds of tiny tokenizers to spell them with."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from markovsafety.rollouts.template import Template

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
)
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"

TEMPLATES = {
    # [INST] <<SYS>> ... <</SYS>> instruction [/INST], the content stripped
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # a block of the template's own, with a date, before the system prompt
    "llama31": (
        "{% if messages[0]['role'] == 'system' %}{% set own = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set own = '' %}{% endif %}"
        "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') }}"
        "{{ '\n\n' + own + '<|eot_id|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "qwen2": DEFAULT + CHATML + OPEN + "{% endif %}",
    # thinking switched off by a block that is closed at once, and left to the model by one that is opened
    "closed": CHATML + OPEN + "{% if enable_thinking is not defined or not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    "opened": CHATML + OPEN + "{{ '<think>\n' }}{% endif %}",
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "vicuna": (
        "A chat with an assistant. {% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "alpaca": (
        "Below is an instruction.\n\n{% for m in messages %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    # like alpaca, but many tokenizers do not give the text after the mark back to the letter
    "lines": (
        "{% for m in messages %}{{ '<|user|>\n' + m['content'] + '\n\n' + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "bare": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "plain": None,
}
ADDED = (
    "<s> </s> <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_end|> <start_of_turn> <end_of_turn>"
)
WORDS = (
    "Describe the harbour ; list three rivers and a bridge of town please [INST] [/INST] user assistant model system"
)
TOKENIZERS = ("bytes", "pieces", "words")
LATER_GPT = (  # letters with one sign before them, numbers, signs with the line breaks after them, white space
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "Describe the harbour.\n\nList three rivers: and a bridge of the town.\n\nWhere is it?\n\n",
    "### Instruction:\nrun!\n\n### Response:\n" * 3,
    "[INST] Where is it? [/INST] <|user|>\n<|assistant|>\nUSER: ASSISTANT: system user assistant model\n",
    "You are a helpful assistant. Today Date: 26 Jul 2024\n\nBelow is an instruction. A chat with an assistant.\n",
] * 4


@cache
def tokenizer(kind: str) -> Tokenizer:
    match kind:
        case "bytes":  # every text comes back; a sign may take the line breaks after it into its token
            made = Tokenizer(models.BPE())
            made.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(LATER_GPT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            )
            made.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
        case "pieces":  # "▁" for a space, one more at the start; bytes for what it has not seen
            learner = Tokenizer(models.BPE())
            learner.pre_tokenizer = pre_tokenizers.Metaspace()
            learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=250))
            learned = json.loads(learner.to_str())["model"]
            names = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *learned["vocab"]]
            merges = [tuple(pair) for pair in learned["merges"]]
            made = Tokenizer(
                models.BPE({n: i for i, n in enumerate(names)}, merges, byte_fallback=True, unk_token="<unk>")
            )
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            made.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        case "words":
            made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *WORDS.split()])}, "<unk>"))
            made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        case _:
            raise KeyError(kind)
    made.add_special_tokens(ADDED.split())
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return made


def folder(path: Path, kind: str, chat: str | None) -> Path:
    """Write a tokenizer with a chat template; the plain one puts its start token before a text."""
    path.mkdir(parents=True, exist_ok=True)
    made = json.loads(tokenizer(kind).to_str())
    start = tokenizer(kind).token_to_id("<s>")
    if chat is None:
        sequence = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        tokens = {"<s>": {"id": "<s>", "ids": [start], "tokens": ["<s>"]}}
        made["post_processor"] = {
            "type": "TemplateProcessing",
            "single": sequence,
            "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": tokens,
        }
    (path / "tokenizer.json").write_text(json.dumps(made))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat is not None:
        settings["chat_template"] = chat
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def load(path: Path, kind: str, chat: str | None) -> Template:
    return Template.load(folder(path, kind, chat))
