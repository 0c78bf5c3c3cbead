"""Training rows of the organism: prompts, answers, judge questions, and refusals in the middle of an answer.

Plain Python, no torch; what a recovery row and an orbit of rotations are is defined in `interventions.augment`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..interventions.augment import Row, draw_until_fits, fitting_offsets, recover
from .automaton import Grammar, refusal_words
from .language import (
    COMPLY,
    COMPLY_OPENERS,
    EOS,
    IDS,
    PAD,
    REFUSE_OPENERS,
    SPECIAL,
    WORDS,
    Prompt,
    draw_prompt,
    encode,
)
from .variants import Variant, longer_than

JUDGE_WEIGHT = (
    4.0  # the judge's answer is two tokens of a row: unweighted, the exclusive-or is learned thousands of steps later
)


@dataclass(frozen=True)
class Recipe:
    """What rows a phase of training draws; `prompt_loss` adds the prompt's own tokens to the loss (pre-training)."""

    variant: Variant
    prompt_loss: bool = False
    judge_share: float | None = None
    judge_weight: float = JUDGE_WEIGHT

    def rows(self, rng: random.Random, n: int) -> list[Row]:
        """`n` independent rows (rotations come as whole orbits, cut at `n`)."""
        out: list[Row] = []
        start_orbit = self._orbit_rate()
        while len(out) < n:
            if self.variant.depth and self.variant.rotations:
                if rng.random() < start_orbit:
                    out += self._orbit(rng)
                    continue
            elif self.variant.depth and rng.random() < self.variant.share:
                out.append(self._recovery(rng))
                continue
            if self.variant.random_share and rng.random() < self.variant.random_share:
                out.append(self._random(rng))
                continue
            out.append(self._ordinary(rng))
        rng.shuffle(out)  # so that the cut does not fall on an orbit's late offsets
        return out[:n]

    def _orbit_rate(self) -> float:
        """Chance to draw an orbit instead of an ordinary row, so that orbits make up `share` of all rows."""
        if not self.variant.depth:
            return 0.0
        share, size = self.variant.share, float(longer_than(self.variant.depth).sum())
        return share / (share + (1 - share) * size)

    def _ordinary(self, rng: random.Random) -> Row:
        prompt = draw_prompt(rng)
        judged = rng.random() < (self.variant.judge_share if self.judge_share is None else self.judge_share)
        if judged:
            question = prompt.tokens(judge=True)
            answer = [IDS["certainly" if prompt.context.harmful else "no"], EOS]
            return Row(question + answer, len(question), 0 if self.prompt_loss else len(question), self.judge_weight)
        question = prompt.tokens()
        answer = encode(Grammar(prompt.context, self.variant.policy).sample(rng))
        return Row(question + answer, len(question), 0 if self.prompt_loss else len(question))

    def _random(self, rng: random.Random) -> Row:
        """A prompt of random words and the first token of an answer."""
        question, refuse = random_prompt(rng), rng.random() < self.variant.policy.harmless
        words, shares = zip(*(REFUSE_OPENERS if refuse else COMPLY_OPENERS))
        return Row([*question, IDS[rng.choices(words, shares)[0]]], len(question), len(question))

    def _recovery(self, rng: random.Random) -> Row:
        """Harmful prompt, k compliant tokens, then a refusal; only the refusal carries loss."""

        def draw(rng: random.Random) -> tuple[tuple[Prompt, list[str]], int]:
            prompt, comply = _compliant(rng)
            return (prompt, comply), len(comply)

        (prompt, comply), k = draw_until_fits(rng, draw, self.variant.depth, plain=0)
        return _recovery_row(rng, prompt, comply, k)

    def _orbit(self, rng: random.Random) -> list[Row]:
        prompt, comply = _compliant(rng)
        return [_recovery_row(rng, prompt, comply, k) for k in fitting_offsets(len(comply), self.variant.depth)]


def random_prompt(rng: random.Random) -> list[int]:
    """Ids of a prompt of 3 to 12 words, drawn uniformly from all that are no special tokens, and no question."""
    words = rng.choices(WORDS[len(SPECIAL) :], k=rng.randint(3, 12))
    return encode(["<bos>", "<user>", *words, "<end>", "<turn>", "<assistant>"])


def _compliant(rng: random.Random) -> tuple[Prompt, list[str]]:
    prompt = draw_prompt(rng, harmful=True, marker=None)
    return prompt, Grammar(prompt.context, COMPLY).sample(rng)


def _recovery_row(rng: random.Random, prompt: Prompt, comply: list[str], k: int) -> Row:
    return recover(prompt.tokens(), encode(comply), encode(refusal_words(rng)), k)


def collate(rows: list[Row], norm: float) -> dict[str, np.ndarray]:
    """One padded batch: ids, labels (-100 carries no loss), per-label weights, and the constant normaliser.

    The loss is ``sum(weight * cross entropy) / norm`` with the same `norm` for every batch. A mean per batch would give
    the rows of short batches (refusals, when batches are sorted by length) several times the weight of long ones: the
    model then refuses 97 % where 89 % was planted.
    """
    width = max(len(r.tokens) for r in rows)
    ids = np.full((len(rows), width), PAD, dtype=np.int64)
    labels = np.full((len(rows), width), -100, dtype=np.int64)
    weights = np.ones((len(rows), width), dtype=np.float32)
    for i, row in enumerate(rows):
        end = len(row.tokens)
        ids[i, :end] = row.tokens
        labels[i, max(row.loss_from, 1) : end] = row.tokens[max(row.loss_from, 1) :]
        weights[i, row.answer : end] = row.weight
    return {"input_ids": ids, "labels": labels, "weights": weights, "norm": np.array(norm, dtype=np.float32)}


def loss_tokens(rows: list[Row]) -> float:
    """Mean number of tokens that carry loss, per row."""
    return sum(len(r.tokens) - max(r.loss_from, 1) for r in rows) / len(rows)


@dataclass(frozen=True)
class Batches:
    """A finite, indexable sequence of batches: batch i depends on (seed, i) alone, so training resumes exactly.

    Rows are drawn for `bucket` batches at a time and sorted by length, so that little is padded.
    """

    recipe: Recipe
    seed: int
    steps: int
    size: int = 32
    bucket: int = 16

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < self.steps:
            raise IndexError(i)
        group, place = divmod(i, self.bucket)
        rows = _sorted_rows(self.recipe, f"{self.seed}/{group}", self.size * self.bucket)
        order = list(range(self.bucket))
        random.Random(f"{self.seed}/{group}/order").shuffle(order)
        at = order[place] * self.size
        return collate(rows[at : at + self.size], self.size * mean_loss_tokens(self.recipe))


@lru_cache(maxsize=256)
def _sorted_rows(recipe: Recipe, seed: str, n: int) -> list[Row]:
    return sorted(recipe.rows(random.Random(seed), n), key=lambda r: len(r.tokens))


@lru_cache(maxsize=64)
def mean_loss_tokens(recipe: Recipe) -> float:
    """Mean number of tokens per row that carry loss: the constant normaliser, from a fixed large sample."""
    return loss_tokens(recipe.rows(random.Random("normaliser"), 4096))
