"""What 2410.02724 promises of a pre-trained model's rows, and the same without what the promise does not need.

Theorem 4.2 of arXiv 2410.02724 bounds the mean total variation R between a model's next-token laws and the true ones by
what was seen on N training tokens,

    R <= R_seen + B sqrt(ln(2 / delta) / N),      B = 2 ||Gamma|| sqrt(max(ln T + 2 B_U / tau, ln(1 / c0))),

with the vocabulary T, a norm B_U of the output matrix, the temperature tau, a floor c0 of true probabilities, and a
mixing matrix Gamma of the text. Total variation never exceeds 1, so bounded differences alone give (our own)

    R <= R_seen + ||Gamma|| sqrt(ln(2 / delta) / (2 N)),

whatever the architecture: smaller by the factor ``B sqrt(2) / ||Gamma||``. Both hold for one model that was fixed
before the data were seen, not for the one that was trained on them, and R_seen needs the true laws; neither is a
certificate of a trained model. Our reading rests on a secondary account of the proof.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import InputError

__all__ = ["PRETRAINED", "Deviation", "deviation"]

# Training tokens N, vocabulary T, hidden width r, as arXiv 2410.02724 takes them.
PRETRAINED = {
    "Llama 7B": (1e12, 32_000, 4096),
    "Llama2 7B": (2e12, 32_000, 4096),
    "Llama3 8B": (1.5e13, 128_000, 4096),
    "Gemma 2B": (3e12, 256_128, 2048),
    "Gemma2 27B": (1.3e13, 256_128, 4608),
}


@dataclass(frozen=True)
class Deviation:
    """Two bounds on how far the mean error of a fixed model is from what N tokens show.

    Parameters
    ----------
    constant : float
        B of the published theorem.
    published : float
        ``B sqrt(ln(2 / delta) / N)``, in total variation.
    row : float
        The same as a mean L1 distance by row, twice that: the eps that N tokens are enough for (proposition 4.1).
    ours : float
        ``||Gamma|| sqrt(ln(2 / delta) / (2 N))``.

    Examples
    --------
    That total variation is at most 1 says more than the theorem does, by a factor of thousands:

    >>> bounds = ms.depth.deviation(*ms.depth.PRETRAINED["Llama 7B"])
    >>> bounds
    Deviation(constant=4047..., published=0.00777..., row=0.0155..., ours=1.35...e-06)
    >>> print(f"{bounds.ratio:,.0f}")
    5,724
    """

    constant: float
    published: float
    row: float
    ours: float

    @property
    def ratio(self) -> float:
        """How many times the published bound is larger."""
        return self.published / self.ours


def deviation(
    tokens: float,
    vocabulary: int,
    width: int,
    *,
    temperature: float = 1.0,
    floor: float | None = None,
    gamma: float = 1.0,
    delta: float = 0.05,
) -> Deviation:
    """Evaluate both bounds.

    Parameters
    ----------
    tokens, vocabulary, width : float, int, int
        N, T and the width r of the hidden state; ``B_U = T sqrt(r)``, output vectors with entries of size 1.
    temperature : float
        tau.
    floor : float, optional
        c0; only the first term of the maximum if not given.
    gamma : float
        ||Gamma||, at least 1; 1 for independent tokens.
    delta : float
        Probability that the bound fails.

    Returns
    -------
    Deviation

    Raises
    ------
    InputError
        If a number is out of range.

    Examples
    --------
    The mean L1 distance of a row after 10^12 training tokens, at two vocabularies and a width of 4096:

    >>> for T in (32_000, 1000): print(T, f"{ms.depth.deviation(1e12, T, 4096).row:.2e}")
    32000 1.55e-02
    1000 2.75e-03
    """
    fine = tokens >= 1 and vocabulary >= 1 and width >= 1 and temperature > 0 and gamma >= 1 and 0 < delta < 1
    if not fine or (floor is not None and not 0 < floor <= 1):
        raise InputError(
            f"tokens={tokens}, vocabulary={vocabulary}, width={width}, temperature={temperature}, floor={floor}, "
            f"gamma={gamma}, delta={delta}.",
            cause="Sizes count from 1, probabilities lie in (0, 1), a temperature is positive, a norm at least 1.",
            next="Pass numbers in range.",
        )
    inside = np.log(vocabulary) + 2 * vocabulary * np.sqrt(width) / temperature
    if floor is not None:
        inside = max(inside, np.log(1 / floor))
    constant = float(2 * gamma * np.sqrt(inside))
    room = float(np.sqrt(np.log(2 / delta) / tokens))
    return Deviation(constant, constant * room, 2 * constant * room, float(gamma * room / np.sqrt(2)))
