"""The twirl measured: rows and harm estimated from samples with and without pooling over rotations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..chains import Chain
from ..errors import InputError
from .symmetry import _orbits, participation_ratio, twirl

__all__ = ["TwirlCheck", "twirl_experiment"]

CHUNK = 1 << 22  # floats of one batch of matrices


@dataclass(frozen=True)
class TwirlCheck:
    """What pooling over rotations did to estimates, beside what the formulas say.

    Parameters
    ----------
    row_ratio : float
        Mean squared error of pooled rows over that of plain rows; 1/n is `row_expected` if the truth is symmetric.
    variance_ratio : float
        Variance of harm at the start, pooled over plain; `variance_expected` is the participation ratio.
    error_ratio : float
        Mean squared error of harm at the start, pooled over plain: the bias counts here.
    bias : float
        Harm of the twirled truth minus harm of the truth, at the start; 0 if the truth is symmetric.
    pooled_bias, plain_bias : float
        Mean error of either estimate.

    Examples
    --------
    Where positions differ, pooling gets less variance for more error:

    >>> found = ms.depth.twirl_experiment(ms.toy.shallow(3), per_row=100, repeats=200)
    >>> print(type(found).__name__, f"bias {found.bias:.3f}, squared error times {found.error_ratio:.0f}")
    TwirlCheck bias -0.178, squared error times 1...
    """

    row_ratio: float
    row_expected: float
    variance_ratio: float
    variance_expected: float
    error_ratio: float
    bias: float
    pooled_bias: float
    plain_bias: float
    repeats: int


def twirl_experiment(
    chain: Chain, per_row: int, repeats: int = 2000, *, target: str = "harm", seed: int = 0
) -> TwirlCheck:
    """Sample the rows of a chain, pool them over rotations or not, and compare the errors.

    Parameters
    ----------
    chain : Chain
        Homogeneous, with a start; every state that is no outcome is on the cycle, in order.
    per_row : int
        Transitions sampled from every row.
    repeats : int
        Number of data sets.
    target : str
        An outcome.
    seed : int

    Returns
    -------
    TwirlCheck

    Raises
    ------
    InputError
        If the chain is layered or has no start, or a number is not positive.

    Examples
    --------
    Four positions that are alike: the error of rows falls to a quarter, that of harm by less.

    >>> P = np.zeros((6, 6))
    >>> P[range(4), [1, 2, 3, 0]], P[:4, 4], P[:4, 5] = 0.7, 0.05, 0.25
    >>> chain = ms.Chain(P, {"harm": 4, "refusal": 5}, start=0)
    >>> found = ms.depth.twirl_experiment(chain, per_row=100, repeats=500)
    >>> print(f"rows {found.row_ratio:.3f}, expected {found.row_expected}")
    rows 0.2..., expected 0.25
    >>> print(f"harm {found.variance_ratio:.3f}, expected {found.variance_expected:.3f}")
    harm 0..., expected 0.868
    """
    if chain.is_layered or chain.start is None or per_row < 1 or repeats < 2:
        raise InputError(
            f"{chain!r} with per_row={per_row}, repeats={repeats}.",
            cause="Rows of a homogeneous chain with a start are sampled several times.",
            next="Pass such a chain, per_row >= 1 and repeats >= 2.",
        )
    orbit = _orbits(chain, None)[0]
    n, ends = len(orbit), np.flatnonzero(chain.outcome_mask)
    hits = chain.mask(target)[ends]
    at = (orbit[:, None], orbit[(np.arange(n)[:, None] + np.arange(n)) % n])
    dense = chain.P.toarray()
    truth = np.concatenate([dense[at], dense[orbit][:, ends]], axis=1)  # rows as seen from their own position
    start = chain.start[orbit]
    rng = np.random.default_rng(seed)
    exact = _harm(truth[None], hits, start)[0]
    squares, harms = np.zeros(2), []
    size = max(1, CHUNK // truth.size)
    for begin in range(0, repeats, size):
        count = min(size, repeats - begin)
        plain = rng.multinomial(per_row, truth, size=(count, n)) / per_row
        pooled = np.broadcast_to(plain.mean(axis=1, keepdims=True), plain.shape)
        squares += [float(((x - truth) ** 2).sum()) for x in (plain, pooled)]
        harms.append(np.stack([_harm(x, hits, start) for x in (plain, pooled)]))
    errors = np.concatenate(harms, axis=1) - exact
    variance, mean = errors.var(axis=1), errors.mean(axis=1)
    both = twirl(chain, target=target)
    return TwirlCheck(
        row_ratio=float(squares[1] / squares[0]),
        row_expected=1 / n,
        variance_ratio=float(variance[1] / variance[0]),
        variance_expected=participation_ratio(chain),
        error_ratio=float((errors[1] ** 2).mean() / (errors[0] ** 2).mean()),
        bias=float(both.harm.value[0] - exact),
        pooled_bias=float(mean[1]),
        plain_bias=float(mean[0]),
        repeats=repeats,
    )


def _harm(rows: NDArray, hits: NDArray, start: NDArray) -> NDArray[np.float64]:
    """Harm at the start for a batch of rows, each seen from its own position; shape (batch,)."""
    n = len(start)
    Q = np.zeros((len(rows), n, n))
    i = np.arange(n)[:, None]
    Q[:, i, (i + np.arange(n)) % n] = rows[:, :, :n]
    b = rows[:, :, n:][:, :, hits].sum(axis=2)
    try:
        return np.linalg.solve(np.eye(n) - Q, b[..., None])[..., 0] @ start
    except np.linalg.LinAlgError:
        raise InputError(
            "A data set shows no way to an outcome.",
            cause="Ends are so rare that no row of it has one.",
            next="Sample more transitions per row.",
        ) from None
