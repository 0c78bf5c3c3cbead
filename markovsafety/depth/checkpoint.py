"""A single refusal checkpoint: one position at which an otherwise unaligned answer is stopped.

Before position d and after it every token is harmful with probability a, a refusal with r, else the answer goes on,
``c = 1 - a - r``; just before token d the checkpoint refuses with probability `success`. With k tokens forced,

    h(k; d) = f (1 - success c^(d - k))  for k < d,  else f,      f = a / (a + r).

Unattacked (k = 0) this *grows* with d: harm may land before the checkpoint. So "safety depth as the position of the
refusal" has an interior optimum only against an attack of random depth: ``g(d) = E[c^(d - K); K < d]`` is largest
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from ..bound import Bound
from ..errors import InputError, UntrustedError
from .attack import LONGEST, AttackLaw, Optimum, law_given
from .optimal import checkpoint_point, most
from .profile import whole
from .width import unit

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A trajectory with one refusal checkpoint.

    Parameters
    ----------
    a, r : float
        Harm and refusal per token elsewhere; they sum to at most 1.
    success : float
        Probability that the checkpoint refuses.

    Raises
    ------
    InputError
        If a number is no probability or the hazards sum to more than 1.

    Notes
    -----
    Refusal at a designated output position is how arXiv 2502.00669 words safety depth; the model and its formulas are
    our own reconstruction. As a chain: `markovsafety.toy.checkpoint`.

    Examples
    --------
    Unattacked, a later checkpoint is worse; against prefills of unknown length there is a best place:

    >>> model = ms.depth.Checkpoint(a=0.08, r=0.02, success=0.95)
    >>> model.harm([1, 5, 20]).value.round(3)
    array([0.116, 0.351, 0.708])
    >>> best = model.optimal_depth(ms.depth.AttackLaw.geometric(0.2))
    >>> print(f"token {best.depth}: harm {best.harm:.3f}")
    token 6: harm 0.432
    """

    a: float
    r: float
    success: float = 1.0

    def __post_init__(self):
        for name in ("a", "r", "success"):
            object.__setattr__(self, name, float(unit(getattr(self, name), name)))
        if self.a + self.r > 1 + 1e-12:
            raise InputError(
                f"a + r is {self.a + self.r:.17g}.",
                cause="Harm and refusal of one token exclude each other.",
                next="Give hazards that sum to at most 1.",
            )

    @property
    def f(self) -> float:
        """Harm without a checkpoint."""
        return self.a / (self.a + self.r) if self.a > 0 else 0.0

    @property
    def c(self) -> float:
        """Probability that a token is neither harm nor refusal."""
        return max(1 - self.a - self.r, 0.0)

    def harm(self, depth: ArrayLike, prefill: ArrayLike = 0, *, attack: AttackLaw | None = None) -> Bound:
        """Probability of harm.

        Parameters
        ----------
        depth : int or array
            Position d of the checkpoint; 0 = none, for there is no token before it that could meet it.
        prefill : int or array
            Number k of forced tokens, broadcast against `depth`; a checkpoint at or before them is skipped.
        attack : AttackLaw, optional
            Law of the number of forced tokens, beyond `prefill`.

        Returns
        -------
        Bound
            Of the broadcast shape.
        """
        d, k = np.broadcast_arrays(whole(depth, "depth"), whole(prefill, "prefill"))
        left = np.maximum(d - k, 0)
        last = int(left.max(initial=0))
        meets = (AttackLaw.fixed(0) if attack is None else law_given(attack)).discount(self.c, last)[left]
        value = self.f * (1 - self.success * meets)
        value = float(value) if value.ndim == 0 else value
        return Bound(value, value, value, 1.0, {}, None, {"name": "P(harm)", "method": "closed form"})

    def optimal_depth(self, attack: AttackLaw) -> Optimum:
        """Position of the checkpoint with the least expected harm.

        Parameters
        ----------
        attack : AttackLaw
            Law of the number K of forced tokens.

        Returns
        -------
        Optimum
            The whole d >= 1 with the largest ``g(d) = E[c^(d - K); K < d]``. For a geometric attack `continuous` is
            ``ln(ln(1 - p) / ln c) / ln(c / (1 - p))``, or ``1 / ln(1 / c)`` where c = 1 - p, and g rises before it and
            falls after it.

        Raises
        ------
        UntrustedError
            If the search would go beyond ten million positions.
        """
        if self.f == 0 or self.success == 0 or self.c == 0:
            return Optimum(0, self.f, self.f, reason="a checkpoint makes no difference")
        if self.c == 1:
            raise InputError(
                "a + r is 0.", cause="Such an answer never ends.", next="Give harm or refusal a probability."
            )
        last = 64
        while True:
            g = attack.discount(self.c, last)
            best = int(g.argmax())
            # Nothing deeper is better: what has arrived only decays, and what is still to arrive is too little.
            if self.c * g[last] + self.c * float(attack.survival(last)) <= g[best]:
                break
            if last > LONGEST:
                raise UntrustedError(
                    f"The optimal position was not found up to {last}.",
                    cause="The attack has a very long tail, or goes beyond it with certainty.",
                    next="Shorten the tail of the attack.",
                    partial=Optimum(best, self.f * (1 - self.success * g[best]), float("nan")),
                )
            last *= 4
        c = 1 - Fraction(self.a) - Fraction(self.r)
        at = most(g, lambda near: attack.exact_discount(c, near))
        value = float(self.f * (1 - self.success * g[at]))
        geometric = attack.n == 0 and attack.tail > 0
        return Optimum(at, value, value, checkpoint_point(self.c, attack.p) if geometric else None)
