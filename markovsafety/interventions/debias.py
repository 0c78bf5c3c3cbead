"""The bias of a safety-tuned model on text that means nothing, token by token and position by position.

Safety tuning leaves a preference for refusing that does not depend on the prompt. Token-level safety-debiased inference
(TSDI, arXiv 2502.02153) measures it where there is nothing to refuse: on prompts of random tokens,

    b_i(v) = mean over random prompts and partial answers of  log pi_safe(v | x, y_<i) - log pi_ref(v | x, y_<i),

and takes it off the logits of the first L tokens of every answer. `bias_table` measures; `BiasTable.edit` is the
debiased model, for ``markovsafety.sample(..., edit=)``.

The paper's numbers (L, prompts, results) could not be read: defaults here are our own. The strength is ours as well;
the paper's is 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError, UntrustedError
from ..rollouts.engines.transformers_batch import Batch
from ..rollouts.sample import sample
from .bias_tables import RESPONSES, BiasTable
from .edits import Edit
from .hooks import Attached
from .host import Host, open_host

__all__ = ["bias_table", "double_laws", "random_prompts", "token_pool"]

FLOOR = 1e-6
"""A token to which both models give less than this on average has a difference of noise: its bias is 0."""
LOGITS = 1 << 25
"""Numbers of a batch of logits in float64: 256 MB."""


def bias_table(
    safe: Any,
    ref: Any,
    pool: Any = None,
    *,
    length: int = 8,
    n: int = 512,
    response: str = "random",
    words: tuple[int, int] = (3, 12),
    floor: float = FLOOR,
    edit: Edit | None = None,
    seed: int = 0,
) -> BiasTable:
    """Measure the bias of a safety-tuned model against a reference.

    Parameters
    ----------
    safe, ref : Host, str, Path or TransformersEngine
        The reference is the model before its safety step (which step that is, reviewers of the paper questioned; it is
        yours to say). Prompts are wrapped in the template of `safe`.
    pool : sequence of ids or of texts, optional
        What random tokens are drawn from, as often as they occur; a neutral corpus. By default every token of the
        vocabulary that is not special, once.
    length : int
        Answer positions L.
    n : int
        Random prompts, each with one partial answer.
    response : {"random", "ref", "safe"}
        Partial answers y_<i: tokens drawn from the pool as in the paper, or sampled from one of the models. A sampled
        one that ends counts for the positions up to its end.
    words : (int, int)
        Least and greatest number of random tokens of a prompt.
    floor : float
        Tokens to which both models give less probability on average get the bias 0; 0 keeps all.
    edit : Edit, optional
        Of `safe`: the bias that an edited model has, for example what a debiased one has left.
    seed : int

    Returns
    -------
    BiasTable

    Raises
    ------
    InputError
        Vocabularies that name tokens differently, a pool without tokens, or numbers that make no sense.
    UntrustedError
        All sampled answers had ended before a position; ``partial`` is the table of the positions before it. Or the
        logits of a model are nan.

    Notes
    -----
    Log-softmax is taken in float64 of the model's float32 logits. Where one model has more tokens than the other (a
    padding token that was added), the common ones are compared, and the others are not tilted.

    Examples
    --------
    What alignment added to openers of refusals on prompts that mean nothing, nats by position: it is shallow.

    >>> aligned, before = (ms.organism.model_path(name) for name in ("shallow", "base"))
    >>> table = ms.interventions.bias_table(aligned, before, n=32, length=2)
    >>> table
    <BiasTable: 2 positions x 199 tokens from 32 random prompts (random answers), largest
    error 0... nats>
    >>> others = [i for i in range(199) if i not in ms.organism.REFUSAL_IDS]
    >>> [round(table.gap(ms.organism.REFUSAL_IDS, others, position)) for position in (0, 1)]
    [3, 0]
    """
    _check(length, n, response, words, floor)
    tuned, before = (m if isinstance(m, Host) else open_host(m) for m in (safe, ref))
    vocab = _common(tuned, before)
    drawn = token_pool(tuned, pool, vocab)
    rng = np.random.default_rng(seed)
    prompts = random_prompts(tuned, drawn, n, words, rng)
    answers = rng.choice(drawn, size=(n, length - 1))
    alive = np.ones((n, length), bool)
    if response != "random" and length > 1:
        alive = _sampled(tuned if response == "safe" else before, prompts, answers, seed)
    sums = _Sums.of(length, vocab)
    for rows, batch in tuned.batches(prompts, list(answers), _size(tuned, length, vocab)):
        at = batch.answer[:, None] - 1 + np.arange(length)
        after, reference = (double_laws(h, batch, at, e)[..., :vocab] for h, e in ((tuned, edit), (before, None)))
        sums.add(after, reference, torch.as_tensor(alive[rows]))
    told = {
        "safe": tuned.identity[0],
        "ref": before.identity[0],
        "pool": hashlib.sha256(drawn.tobytes()).hexdigest(),
        "n": n,
        "response": response,
        "template": tuned.identity[1],
        "about": {
            "seed": seed,
            "words": list(words),
            "floor": floor,
            "edit": None if edit is None else edit.describe(),
        },
    }
    return sums.table(floor, told)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Running sums over random prompts, float64 (length, vocab): of probabilities, differences, and their squares."""

    safe: torch.Tensor
    ref: torch.Tensor
    first: torch.Tensor
    own: torch.Tensor
    second: torch.Tensor
    finite: torch.Tensor
    seen: torch.Tensor

    @classmethod
    def of(cls, length: int, vocab: int) -> _Sums:
        safe, ref, first, own, second = torch.zeros(5, length, vocab, dtype=torch.float64)
        finite, seen = torch.ones(length, vocab, dtype=torch.bool), torch.zeros(length, dtype=torch.int64)
        return cls(safe, ref, first, own, second, finite, seen)

    def add(self, safe: torch.Tensor, ref: torch.Tensor, alive: torch.Tensor) -> None:
        finite = torch.isfinite(safe) & torch.isfinite(ref)
        change = torch.where(finite, safe - ref, torch.zeros((), dtype=torch.float64))
        kept = alive[..., None].double()
        p, q = safe.exp(), ref.exp()
        # A constant of a sample means nothing, so that errors are those of the difference to its own mean.
        own = change - (change * (p + q) / 2).sum(-1, keepdim=True)
        self.safe.add_((p * kept).sum(0))
        self.ref.add_((q * kept).sum(0))
        self.first.add_((change * kept).sum(0))
        self.own.add_((own * kept).sum(0))
        self.second.add_((own**2 * kept).sum(0))
        self.finite.logical_and_((finite | ~alive[..., None]).all(0))
        self.seen.add_(alive.sum(0))

    def table(self, floor: float, told: dict[str, Any]) -> BiasTable:
        seen = self.seen.numpy()
        size = int((seen > 1).sum())  # positions are reached in order
        if not size:
            raise InputError(
                "one random prompt has no standard error",
                cause="the bias is a mean over prompts",
                next="give n of 2 or more; some hundreds are usual",
            )
        m = seen[:size, None].astype(float)
        safe, ref, first, own, second = (
            t.numpy()[:size] / m for t in (self.safe, self.ref, self.first, self.own, self.second)
        )
        finite = self.finite.numpy()[:size]
        counted = (np.maximum(safe, ref) >= floor) & finite
        error = np.sqrt(np.maximum(second - own**2, 0.0) / (m - 1))
        # Tokens that do not count are one block: the others stand against its mean, so that it keeps its share.
        weight = np.where(finite & ~counted, safe + ref, 0.0)
        mass = weight.sum(axis=1, keepdims=True)
        rest = (first * weight).sum(axis=1, keepdims=True) / np.where(mass > 0, mass, 1.0)
        bias = np.where(counted, np.where(mass > 0, first - rest, own), 0.0)
        made = BiasTable(bias, np.where(counted, error, 0.0), counted, seen[:size], **told)
        if size == len(seen):
            return made
        raise UntrustedError(
            f"only {int(seen[size])} of {told['n']} partial answers reach position {size + 1}",
            cause=f"the answers sampled for response={told['response']!r} end before it",
            next=f'give length={size}, or response="random"',
            partial=made,
        )


def double_laws(host: Host, batch: Batch, at: NDArray, edit: Edit | None = None) -> torch.Tensor:
    """Log-probabilities at chosen columns of a batch, float64 (rows, columns, vocab), on the CPU.

    Parameters
    ----------
    host : Host
    batch : Batch
    at : int array, shape (rows, columns)
        Column c predicts the token of column c + 1.
    edit : Edit, optional

    Raises
    ------
    UntrustedError
        A logit is nan.
    """
    index = torch.as_tensor(at, device=host.engine.device)[..., None]
    if edit is None:
        logits = host.forward(batch, logits=True)
    else:
        with Attached(host, edit).during(batch) as change:
            logits = host.forward(batch, logits=True)
            logits = logits if change is None or logits is None else change(logits, 0)
    assert logits is not None
    picked = logits.gather(1, index.expand(-1, -1, logits.shape[-1])).cpu().double()
    law = torch.log_softmax(picked, dim=-1)
    if torch.isnan(law).any():
        raise UntrustedError(
            "a logit of the model is nan",
            cause="damaged weights, or a dtype whose range the activations leave (float16)",
            next='use dtype="float32" or "bfloat16"',
        )
    return law


def token_pool(host: Host, pool: Any, vocab: int) -> NDArray[np.int64]:
    """Ids that random prompts are made of; see `bias_table`.

    Raises
    ------
    InputError
        No token is left, or ids that the models do not have.
    """
    template = host.engine.tokenizer
    tokenizer = template.tokenizer
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special |= {*template.eos_ids, *template.end_ids}
    if pool is None:
        given: Iterator[int] | Sequence[int] = sorted(tokenizer.get_vocab().values())
    elif isinstance(pool, str) or any(isinstance(piece, str) for piece in pool):
        texts = [pool] if isinstance(pool, str) else pool
        given = [int(i) for text in texts for i in template.encode(text)]
    else:
        given = [int(i) for i in pool]
        beyond = [i for i in given if not 0 <= i < vocab]
        if beyond:
            raise InputError(
                f"the pool holds {beyond[0]}",
                cause=f"the models share the ids 0 to {vocab - 1}",
                next="give ids of their vocabulary, or texts",
            )
    made = np.array([i for i in given if i not in special and i < vocab], dtype=np.int64)
    if not len(made):
        raise InputError(
            "the token pool is empty",
            cause="it has no token beside special ones",
            next="give ids or texts of ordinary words",
        )
    return made


def random_prompts(
    host: Host, pool: NDArray, n: int, words: tuple[int, int], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Ids of n prompts of random tokens, in the chat template; nothing is tokenised."""
    spans = host.spans()
    sizes = rng.integers(words[0], words[1] + 1, size=n)
    return [np.array([*spans.prefix, *rng.choice(pool, size=size), *spans.suffix], np.int64) for size in sizes]


def _sampled(host: Host, prompts: list[NDArray], answers: NDArray, seed: int) -> NDArray[np.bool_]:
    """Write sampled tokens into the partial answers; which positions they reach, bool (n, length)."""
    n, size = answers.shape
    records = [{"prompt_tokens": ids} for ids in prompts]
    rolls = sample(host.engine, records, n=1, max_tokens=size, seed=seed, progress=False)
    stop = np.array(sorted({*host.engine.tokenizer.eos_ids, *host.engine.tokenizer.end_ids}))
    ended = np.zeros((n, size + 1), bool)
    for row, said in enumerate(rolls.answers()):
        answers[row, : len(said)] = said
        ended[row, 1 : len(said) + 1] = np.isin(said, stop)
    return ~np.logical_or.accumulate(ended, axis=1)


def _common(safe: Host, ref: Host) -> int:
    """Number of leading ids that both models have; they must mean the same."""
    size = min(safe.vocab_size, ref.vocab_size)
    if safe.engine.tokenizer.tokenizer_hash == ref.engine.tokenizer.tokenizer_hash != "":
        return size
    one, other = (
        {i: word for word, i in h.engine.tokenizer.tokenizer.get_vocab().items() if i < size} for h in (safe, ref)
    )
    wrong = sorted(i for i in one.keys() & other.keys() if one[i] != other[i])
    if wrong:
        raise InputError(
            f"the vocabularies differ: {len(wrong)} ids mean other tokens, the first {wrong[0]} "
            f"({one[wrong[0]]!r} and {other[wrong[0]]!r})",
            cause="a bias is the difference of two models about the same token",
            next="compare a model with the one that it was tuned from",
        )
    return size


def _size(host: Host, length: int, vocab: int) -> int:
    """Rows of a batch whose logits stay within bounds."""
    return max(1, min(host.engine.batch_size, 64, LOGITS // (vocab * (length + 32))))


def _check(length: int, n: int, response: str, words: tuple[int, int], floor: float) -> None:
    if length < 1 or n < 2 or response not in RESPONSES or not 1 <= words[0] <= words[1] or not 0 <= floor < 1:
        raise InputError(
            f"length={length}, n={n}, response={response!r}, words={words}, floor={floor}",
            cause="positions and prompts are counted, a standard error needs two prompts, and responses are "
            + ", ".join(RESPONSES),
            next='give length >= 1, n >= 2, words=(least, most), 0 <= floor < 1, response="random", "ref" or "safe"',
        )
