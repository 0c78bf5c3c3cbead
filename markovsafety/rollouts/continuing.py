"""Answers continued from prefixes of any length: what splitting and branching ask of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..outcomes import NOT_JUDGED
from .asked import Asked, ask
from .engines import Engine, Job, Output, rollout_keys
from .judges import _open as open_judge
from .judges import judge as judge_rollouts
from .rollouts import Ragged, Rollouts
from .sample import _engine

__all__ = ["Continuing", "continuing"]

STEP = 16
"""Prefixes are run together if their lengths differ by less than this."""


@dataclass(frozen=True)
class Continuing:
    """A model, its prompts and a judge: call it with prompts and prefixes, and it says the rest.

    Parameters
    ----------
    engine : Engine
    asked : Asked
    judge : Judge
    max_tokens : int
        Largest number of tokens of an answer, the prefix included.
    temperature, top_p : float
    fine : bool
    """

    engine: Engine
    asked: Asked
    judge: Any
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    fine: bool = False

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.asked.tokens)

    def __call__(self, prompt: Any, prefixes: Sequence[Any], seed: int) -> Rollouts:
        """Continue every prefix once.

        Parameters
        ----------
        prompt : int array, shape (n,)
            Index of the prompt of each.
        prefixes : sequence of n int arrays
            Tokens said so far, fewer than `max_tokens`, without the end of an answer.
        seed : int

        Returns
        -------
        Rollouts
            Whole answers, judged as a whole: a prefix counts as said by the model (``prefill`` is 0), so a harmful
            phrase that began in it is found. ``logprob`` is nan on the prefix.

        Raises
        ------
        InputError
            A prefix that leaves no room or ends the answer.
        """
        forced = [np.asarray(p, dtype=np.int32) for p in prefixes]
        at = np.asarray(prompt, dtype=np.int64)
        lengths = np.array([len(p) for p in forced], dtype=np.int64)
        if (lengths >= self.max_tokens).any():
            raise InputError(
                f"a prefix has {int(lengths.max())} tokens, an answer at most {self.max_tokens}",
                cause="nothing could follow it",
                next="continue shorter prefixes, or set max_tokens higher",
            )
        keys = rollout_keys(seed, np.arange(len(forced)))
        answers: list[Any] = [None] * len(forced)
        logprob: list[Any] = [None] * len(forced)
        for group in np.unique(lengths // STEP):
            rows = np.flatnonzero(lengths // STEP == group)
            output = self._run(at[rows], [forced[i] for i in rows], keys[rows], int(lengths[rows].min()))
            for i, tokens, law in zip(rows, output.tokens, output.logprob):
                answers[i], logprob[i] = tokens[: self.max_tokens], law[: self.max_tokens]
        rolls = Rollouts.of(
            answers,
            prompt_id=self.asked.prompt_id[at],
            category=self.asked.category[at],
            outcome=NOT_JUDGED,
            columns={
                "prompt_tokens": Ragged.of([self.asked.tokens[i] for i in at]),
                "logprob": Ragged.of(logprob, np.float32).flat,
            },
            provenance={
                "sampling": {"temperature": self.temperature, "top_p": self.top_p, "eos_ids": list(self._stop)}
            },
        )
        return judge_rollouts(rolls, self.judge)

    @property
    def _stop(self) -> tuple[int, ...]:
        template = self.engine.tokenizer
        return tuple(sorted({*template.eos_ids, *template.end_ids}))

    def _run(self, prompt: np.ndarray, forced: list[np.ndarray], keys: np.ndarray, least: int) -> Output:
        used, prompt_of = np.unique(prompt, return_inverse=True)
        job = Job(
            prompts=[self.asked.tokens[i] for i in used],
            prompt_of=prompt_of,
            forced=forced,
            keys=keys,
            max_tokens=self.max_tokens - least,
            temperature=self.temperature,
            top_p=self.top_p,
            eos_ids=self._stop,
            end_ids=self._stop,
            processed=False,
            fine=self.fine,
        )
        return self.engine.run(job)


def continuing(
    model: Any,
    prompts: Any,
    *,
    max_tokens: int,
    judge: Any,
    engine: str = "auto",
    device: str | None = None,
    dtype: str = "float32",
    batch_size: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    system: str | None = None,
    fine: bool = False,
) -> Continuing:
    """Open a model so that its answers can be continued from any prefix.

    Parameters
    ----------
    model, prompts, engine, device, dtype, batch_size, temperature, top_p, system, fine
        As in `sample`.
    max_tokens : int
        Largest number of tokens of an answer, whatever its prefix.
    judge : str or Judge

    Returns
    -------
    Continuing
        ``continue_(prompt, prefixes, seed)``, e.g. for ``evidence.rare.Prefixes``.

    Raises
    ------
    InputError
        Prompts or parameters that make no sense.
    ModelError
        The model cannot be loaded.
    """
    if not isinstance(max_tokens, int | np.integer) or max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens!r}", cause="it counts tokens", next="give an integer >= 1")
    opened = _engine(model, engine, device=device, dtype=dtype, batch_size=batch_size)
    asked = ask(prompts, opened.tokenizer, system=system)
    said = open_judge(judge, {})
    said = getattr(said, "bind", lambda _: said)(opened.tokenizer)
    return Continuing(opened, asked, said, int(max_tokens), float(temperature), float(top_p), fine)
