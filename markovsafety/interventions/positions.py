"""Where the instruction ends and where the prompt ends, for any chat template: t_inst and t_post.

A prompt is ``prefix + instruction + suffix``. Harmfulness is read at t_inst, the last token of the instruction, refusal
at t_post, the last token of the prompt (arXiv 2507.11878, section 2). The authors write the length of the suffix down
per model; here it is derived (`boundaries.py`). Ids are those of `Template.prompt_ids`, which are what the model sees,
and never changed. A tokenizer may join the end of an instruction with the template's text (a full stop and two line
breaks are one token of many): no boundary is then right for all prompts, and `Spans.check` refuses those that it is
wrong for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..rollouts.template import Template
from .boundaries import SENTINELS, Spelled, frame, given_back, ids_after, ids_before, suffix_size

__all__ = ["Span", "Spans", "spans"]

Span = tuple[int, int | None]
"""Start and stop of a slice over the ids of a prompt; negative ones count from its end."""

PROSE = re.compile(r"\bsystem\b|\w+ \w+ \w+")
"""What tells a text of the template's own before the instruction from mere marks of role."""
THINKING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>|\[(/?)THINK\]")


@dataclass(frozen=True)
class Spans:
    """Slices over the ids of a prompt, the same for every prompt of a template.

    Attributes
    ----------
    prefix : tuple of int
        Ids before the instruction, with the system prompt, be it the template's own. White space of the template that
        the tokenizer joins with the instruction's first word belongs to the instruction.
    suffix : tuple of int
        Post-instruction ids, up to where the assistant begins; () for a template without them.
    question : tuple of int
        Ids of a fixed question between instruction and suffix; () without one.
    notes : tuple of str
        What a reader of the positions should know: a default system prompt, a thinking block that the template opens,
        endings that share a token with the template.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> from markovsafety.rollouts.template import Template
    >>> template = Template.load(organism.model_path("shallow"))
    >>> found = inside.spans(template)
    >>> found
    Spans(prefix=(1, 4), suffix=(5, 6, 7), question=(), notes=())
    >>> words = np.array(organism.WORDS)[template.prompt_ids("v05 the bio5 .")]
    >>> print(*words)
    <bos> <user> v05 the bio5 . <end> <turn> <assistant>
    >>> for name in ("instruction", "t_inst", "t_post"):
    ...     print(name, *words[slice(*getattr(found, name))])
    instruction v05 the bio5 .
    t_inst .
    t_post <assistant>
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    question: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def after(self) -> int:
        """Number of tokens after the instruction."""
        return len(self.question) + len(self.suffix)

    @property
    def instruction(self) -> Span:
        """All tokens of the instruction of a prompt of one turn."""
        return len(self.prefix), -self.after or None

    @property
    def t_inst(self) -> Span:
        """The last token of the instruction."""
        return -self.after - 1, -self.after or None

    @property
    def t_post(self) -> Span:
        """The last token of the prompt, also where the template opens a thinking block."""
        return -1, None

    @property
    def everything(self) -> Span:
        """All tokens of the prompt."""
        return 0, None

    @property
    def before_question(self) -> Span:
        """Template and instruction, up to the question (up to the suffix where there is none)."""
        return 0, -self.after or None

    def separate(self) -> tuple[Span, Span]:
        """t_inst and t_post, which must differ.

        Raises
        ------
        InputError
            Nothing follows the instruction, so that both are the same token.
        """
        if not self.after:
            raise InputError(
                "the template has no post-instruction tokens, so t_inst and t_post are one token",
                cause="nothing follows the instruction in the prompt: what the model believes and what it is about to "
                "do are read at the same place",
                next="use a chat template that opens the assistant's turn, or read at t_inst alone",
            )
        return self.t_inst, self.t_post

    def bare(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The prompt without its post-instruction tokens (a question stays).

        Harmful prompts that are accepted are found this way (arXiv 2507.11878, section 3.1).

        Parameters
        ----------
        ids : int array, shape (tokens,)

        Returns
        -------
        int32 array, shape (tokens - suffix,)

        Raises
        ------
        InputError
            The ids do not end with the suffix.
        """
        self.check(ids, single_turn=False)
        return np.asarray(ids, np.int32)[: len(ids) - len(self.suffix)]

    def check(self, ids: Sequence[int] | np.ndarray, which: str = "the prompt", *, single_turn: bool = True) -> None:
        """Raise unless these positions are right for a prompt.

        Parameters
        ----------
        ids : int array, shape (tokens,)
            Of the whole prompt, without padding.
        which : str
            How an error names it.
        single_turn : bool
            False accepts what does not begin with the prefix: a conversation of several turns, whose last message
            counts as the instruction (`instruction` then begins too early; the other spans are right).

        Raises
        ------
        InputError
            Other ids before or after the instruction, or no instruction between them.
        """
        given = tuple(int(i) for i in ids)
        end = (*self.question, *self.suffix)
        tail = given[len(given) - len(end) :] if len(given) >= len(end) else given
        if tail != end:
            raise InputError(
                f"{which} does not end with the ids {end} that follow an instruction of this template",
                cause=f"it ends with {tail}: the last characters of the instruction share a token with the template's "
                "text, or the prompt was made by another template or without the question",
                next="end the instruction otherwise (a letter, no white space), begin the question with a space, or "
                "leave this prompt out",
            )
        head = given[: len(self.prefix)]
        if single_turn and head != self.prefix:
            at = next((i for i, (a, b) in enumerate(zip(head, self.prefix)) if a != b), len(head))
            raise InputError(
                f"{which} does not begin with the {len(self.prefix)} ids that stand before an instruction",
                cause=f"the first other id is at {at}: another system prompt, a date that changed, several turns, or "
                "an instruction whose first characters share a token with the template's text",
                next="make the spans with the system prompt that the prompt has; for several turns: single_turn=False",
            )
        if len(given) <= len(end) + (len(self.prefix) if single_turn else 0):
            raise InputError(
                f"{which} has no instruction",
                cause="there is no token between what the template puts before and after it",
                next="leave it out, or give it some text",
            )


def spans(
    template: Template,
    *,
    system: str | None = None,
    question: str | None = None,
    wrap: Callable[[str], str] | None = None,
) -> Spans:
    """Where instruction and post-instruction tokens are in the prompts of a template.

    Parameters
    ----------
    template : Template
        Of the model; one without a chat template works too (then nothing, or the tokenizer's end token, follows the
        instruction).
    system : str, optional
        The system prompt that all prompts have; by default ``template.system``, else what the template does without.
    question : str, optional
        Text that follows every instruction within the user's message, with the white space before it.
    wrap : callable, optional
        Instead of `question`: instruction -> text of the user's message. What it puts before the instruction counts as
        prefix, what it puts after it as question.

    Returns
    -------
    Spans

    Raises
    ------
    InputError
        The template refuses or changes an instruction; no token boundary where the instruction begins or ends,
        whatever it is; question and template share a token; both `question` and `wrap`.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> from markovsafety.rollouts.template import Template
    >>> template = Template.load(organism.model_path("shallow"))
    >>> inside.spans(template, question=" <judge>")
    Spans(prefix=(1, 4), suffix=(5, 6, 7), question=(8,), notes=())
    """
    if question is not None and wrap is not None:
        raise InputError(
            "both question and wrap are given",
            cause="each of them says what the user's message is",
            next="give one of them",
        )
    system = template.system if system is None else system
    message = wrap or (lambda instruction: instruction + (question or ""))
    before, after = frame(template, message, system)
    opening, closing = frame(template, str, system)
    if not after.endswith(closing):
        raise InputError(
            f"the template ends with {after[-40:]!r} after the question and with {closing[-40:]!r} without it",
            cause="what it renders after the instruction depends on the message",
            next="end the question with other characters",
        )
    notes = tuple(_notes(template, system, opening, closing))
    before, after, closing = (given_back(template, text) for text in (before, after, closing))
    spelled = [Spelled.of(template, template.prompt_text(message(s), system), before) for s in SENTINELS]
    head, opens = ids_before(spelled, before)
    tail, ends = ids_after(spelled, after)
    if any(one.ids == (*head, *tail) for one in spelled):
        raise InputError(
            f"an instruction of one word has no token of its own before {after[:20]!r}",
            cause="the tokenizer takes word and template together, as an unknown word",
            next="use a tokenizer that knows the template's marks, or a template with space around the instruction",
        )
    split = len(tail) - suffix_size(spelled, tail, after, closing)
    suffix = (*tail[split:], *spelled[0].back)
    none = () if suffix else ("no post-instruction tokens: the prompt ends with what the user says",)
    return Spans((*spelled[0].front, *head), suffix, tail[:split], (*notes, *none, *opens, *ends))


def _notes(template: Template, system: str | None, opening: str, closing: str) -> Iterator[str]:
    """What the template does unasked."""
    if template.chat_template is None:
        yield "no chat template: the prompt is plain text"
        return
    if system is None and (own := _default_system(template, opening)):
        yield f"the prefix holds a system prompt of the template's own: {own!r}"
    padded = f"\t{SENTINELS[0]}\t"
    if padded not in template.prompt_text(padded, system):
        yield "the template strips white space around the instruction"
    if marks := list(THINKING.finditer(closing)):
        closed = any(marks[-1].groups())
        what = "an empty thinking block" if closed else "a thinking block, so what is sampled first is thought"
        yield f"the template ends the prompt with {what}; t_post is still the last prompt token, {closing[-12:]!r}"


def _default_system(template: Template, opening: str) -> str:
    """The system prompt that the template puts where nobody gave one; "" without one."""
    mark = SENTINELS[0]
    try:
        given = template.prompt_text(SENTINELS[1], mark).split(SENTINELS[1])[0]
    except InputError:  # a template without system prompts
        given = ""
    if given.count(mark) == 1:
        start, end = given.split(mark)
        if opening.startswith(start) and opening.endswith(end) and len(opening) > len(start) + len(end):
            return opening[len(start) : len(opening) - len(end)].strip()
    return opening.strip() if PROSE.search(opening) else ""
