"""The organism's tokenizer: one id per word, in the files that tokenizers and transformers read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .language import IDS, SPECIAL

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }} <end> <turn> "
    "{% elif message['role'] == 'assistant' %}<assistant> {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tokenizer(
    folder: str | os.PathLike[str],
    ids: Mapping[str, int] = IDS,
    *,
    special: Sequence[str] = SPECIAL,
    chat_template: str = CHAT_TEMPLATE,
    positions: int = 256,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into a model folder.

    Parameters
    ----------
    folder : path
    ids : mapping of word -> id
        With `<bos>`, `<eos>`, `<pad>` and `<unk>` among the words.
    special : sequence of str
        The words among them that are no text.
    chat_template : str
        Jinja source.
    positions : int
        Longest sequence of the model, in tokens.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(s, special=True, lstrip=True, rstrip=True) for s in special])
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
