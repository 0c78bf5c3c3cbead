"""Where the text of an instruction begins and ends among the ids of a prompt.

The template renders instructions that begin and end in very different ways. What stands before and after them in the
text must be the same for all; the ids of it are then looked for from the end of the prompt backwards, at the token
boundaries at which the decoded text falls into what is before and what is after. A boundary that only some instructions
have is kept, with a note that says which have it not; one that none has is an error that names the tokens in the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError
from ..rollouts.template import Template

__all__ = ["SENTINELS", "Spelled", "frame", "given_back", "ids_after", "ids_before", "suffix_size"]

SENTINELS = (
    "Describe the harbour",
    "7 bridges, built in 1942",
    "where is it?",
    "Close the door.",
    "run!",
    "(a word in brackets)",
    '"a word in quotes"',
    "A list of rivers:",
    "- an item;",
    "a_name = another_name",
    "{key: value}",
    "[link]",
    "<b>bold</b>",
    "`code`",
    "$5 or 5%",
    "HARBOUR",
    "and so on…",
    "请介绍这座城市",
    "请介绍。",
    "опишите город",
    "صف المدينة",
    "élan, café",
    "🌊 a wave 🌊",
)
"""Instructions with many kinds of first and last characters; none of them is white space, which templates may strip."""


class Cut(NamedTuple):
    """A token boundary that is one of the text as well: the decoded text falls into `left` and `right`."""

    at: int
    left: str
    right: str


@dataclass(frozen=True)
class Spelled:
    """Ids of a prompt, those that the tokenizer adds around them, and the boundaries that the search needs.

    The boundaries go from the end backwards, up to the first one before the instruction.
    """

    front: tuple[int, ...]
    ids: tuple[int, ...]
    back: tuple[int, ...]
    cuts: tuple[Cut, ...]

    @classmethod
    def of(cls, template: Template, text: str, before: str) -> Spelled:
        ids = template.encode(text).tolist()
        front, back = _added(template, text, ids) if template.chat_template is None else ((), ())
        whole = template.decode(ids, skip_special_tokens=False)
        cuts = []
        for at in range(len(ids), -1, -1):
            left = template.decode(ids[:at], skip_special_tokens=False)
            if not whole.startswith(left):  # inside a character of several tokens
                continue
            cuts.append(Cut(at, left, whole[len(left) :]))
            if len(_dense(left)) < len(_dense(before)):
                break
        return cls(front, tuple(ids), back, tuple(cuts))


def _added(template: Template, text: str, ids: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer adds before and after plain text."""
    given = template.encode(text, add_special_tokens=True).tolist()
    for at in range(len(given) - len(ids) + 1):
        if given[at : at + len(ids)] == ids:
            return tuple(given[:at]), tuple(given[at + len(ids) :])
    raise InputError(
        f"the tokenizer of {template.folder} spells a text otherwise when it adds its special tokens",
        cause="its post-processor changes more than beginning and end",
        next="use a model with a chat template, or a tokenizer that adds tokens around the text only",
    )


def _dense(text: str) -> str:
    """Without white space, which many tokenizers do not give back."""
    return "".join(text.split())


def frame(template: Template, message: Callable[[str], str], system: str | None) -> tuple[str, str]:
    """The text before and after the instruction, which must not depend on it."""
    frames = set()
    for sentinel in SENTINELS:
        text = template.prompt_text(message(sentinel), system)
        if text.count(sentinel) != 1:
            raise InputError(
                f"the instruction {sentinel!r} is {text.count(sentinel)} times in the prompt {text[-120:]!r}",
                cause="the template, or the wrap, changes, drops or repeats what the user says",
                next="use a template and a wrap that hold the instruction once, as it is",
            )
        frames.add(tuple(text.split(sentinel)))
    if len(frames) > 1:
        one, other = sorted(frames)[:2]
        raise InputError(
            f"the template puts {one!r} around one instruction and {other!r} around another",
            cause="what it renders depends on the instruction, or on the time of day",
            next="use a template whose text around the instruction is fixed",
        )
    return frames.pop()


def given_back(template: Template, text: str) -> str:
    """A text of the template as the tokenizer spells it: without capitals where it has none, or with unknown words."""
    back = template.decode(template.encode(text), skip_special_tokens=False)
    return text if _dense(back) == _dense(text) else back


def ids_after(spelled: list[Spelled], after: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids after the instruction, and a note on the endings for which they are others.

    Where the tokenizer gives white space back, the text must be met to the letter: a line break that is joined with a
    full stop would else look like a boundary.
    """
    exact = any(cut.right == after for one in spelled for cut in one.cuts)
    form = str if exact else _dense
    tails, joined = [], []
    for one in spelled:
        at = [cut.at for cut in one.cuts if form(cut.right) == form(after)]
        tails.append(one.ids[min(at) :] if at else None)
        if not at:
            last = next((i for i, cut in enumerate(one.cuts) if len(form(cut.right)) > len(form(after))), 0)
            joined.append(one.cuts[max(last - 1, 0)].left[len(one.cuts[last].left) :])
    tail, others = _common(tails, joined, f"the end of an instruction and the beginning of {after[:20]!r}")
    if not others:
        return tail, ()
    endings = _listed(SENTINELS[i][-1] for i in others)
    return tail, (f"an instruction that ends with {endings} changes the ids after it{_both(joined)}: check refuses it",)


def ids_before(spelled: list[Spelled], before: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids before the instruction, and a note on the beginnings for which they are others.

    White space at the end of the template's text may be in the instruction's first token (" Describe" is one token of
    most tokenizers), so it does not count.
    """
    heads, joined = [], []
    for one in spelled:
        at = [cut.at for cut in one.cuts if _dense(cut.left) == _dense(before)]
        heads.append(one.ids[: max(at)] if at else None)
        if not at:
            joined.append(one.cuts[-2].left[len(one.cuts[-1].left) :])
    head, others = _common(heads, joined, f"the end of {before[-20:]!r} and the beginning of an instruction")
    shortest = min((h for h in heads if h is not None), key=len)
    if all(h is None or h[: len(shortest)] == shortest for h in heads):  # they differ in white space only
        head, others = shortest, [i for i, h in enumerate(heads) if h is None]
    if not others:
        return head, ()
    beginnings = _listed(SENTINELS[i][0] for i in others)
    return head, (
        f"an instruction that begins with {beginnings} changes the ids before it{_both(joined)}: check refuses it",
    )


def _common(pieces: list[tuple[int, ...] | None], joined: list[str], both: str) -> tuple[tuple[int, ...], list[int]]:
    """The piece that most instructions have, and which instructions have another or none."""
    found = Counter(piece for piece in pieces if piece is not None)
    if not found:
        raise InputError(
            f"no instruction has a token boundary there: the tokens {_listed(joined)} hold {both}",
            cause="the tokenizer joins the instruction with the text around it, so there is no last (or first) token "
            "of the instruction alone",
            next="put white space between the instruction and the question, or use a chat template that has a special "
            "token there",
        )
    most = found.most_common(1)[0][0]
    return most, [i for i, piece in enumerate(pieces) if piece != most]


def suffix_size(spelled: list[Spelled], tail: tuple[int, ...], after: str, closing: str) -> int:
    """How many ids of the tail are the template's own, not the question's."""
    if after == closing:
        return len(tail)
    own = next(one for one in spelled if one.ids[len(one.ids) - len(tail) :] == tail)
    form = str if any(cut.right == after for cut in own.cuts) else _dense
    met = [cut for cut in own.cuts if cut.at >= len(own.ids) - len(tail) and form(cut.right) == form(closing)]
    if not met:
        raise InputError(
            f"the question and the template's {closing[:20]!r} share a token",
            cause=f"the tokenizer joins {after[: len(after) - len(closing)][-10:]!r} with what follows it",
            next="end the question with other characters",
        )
    return len(own.ids) - min(cut.at for cut in met)


def _both(joined: list[str]) -> str:
    return f" (tokens {_listed(joined)} hold both)" if joined else ""


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(repr(text) for text in dict.fromkeys(texts))
