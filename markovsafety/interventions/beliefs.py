"""Beliefs: how near a prompt's activations are to those of harmful and of refused prompts, over all levels.

Harmfulness is believed at t_inst, refusal is decided at t_post. Beside what the model does, that makes a 2 x 2 table:
believed harmful or not x refused or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bound import clustered
from ..errors import InputError
from .buckets import Buckets, listed
from .differences import cell_mean, states
from .directions import POSITIONS
from .edits import Edit, check_identity
from .positions import Spans

if TYPE_CHECKING:
    from .host import Host

__all__ = ["SAME", "Beliefs", "Centres", "belief_table", "believe", "centres"]

SIDES = ("harm", "refusal")
SAME = 1e-5
"""Centres nearer than this share of their length are one point: the position holds one token, nothing was read yet."""


@dataclass(frozen=True, eq=False)
class Centres:
    """Means of the two plain buckets at both positions.

    Parameters
    ----------
    harm : float64 array, shape (2, levels, width)
        At t_inst: of refused harmful and of accepted harmless prompts.
    refusal : float64 array, shape (2, levels, width)
        At t_post: of the same.
    counts : (int, int)
        Prompts behind them.
    model, template : str or None
    about : dict

    Examples
    --------
    Streams of one level and two dimensions. Prompts on the side of the harmful centre have a score above 0:

    >>> means = ms.interventions.Centres(np.eye(2)[:, None], np.eye(2)[:, None], counts=(8, 8))
    >>> means
    <Centres of 8 + 8 prompts: 1 levels x 2 dimensions>
    >>> means.scores([[[3.0, 0.0]], [[1.0, 1.0]], [[0.0, 2.0]]], "harm").ravel()
    array([ 1.,  0., -1.])
    """

    harm: NDArray
    refusal: NDArray
    counts: tuple[int, int]
    model: str | None = None
    template: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in SIDES:
            pair = getattr(self, name)
            if (norms := np.linalg.norm(pair, axis=-1)).min() == 0:
                side, level = np.argwhere(norms == 0)[0]
                raise InputError(
                    f"a mean of {name} is zero at level {level}",
                    cause=f"that of {('positive', 'negative')[side]} prompts has no direction, so no cosine with it",
                    next="give other prompts, or check the model's activations",
                )

    def __repr__(self) -> str:
        _, levels, width = self.harm.shape
        return f"<Centres of {self.counts[0]} + {self.counts[1]} prompts: {levels} levels x {width} dimensions>"

    def used(self, side: str) -> NDArray:
        """Levels that tell the two centres of "harm" or "refusal" apart, bool (levels,)."""
        one, other = getattr(self, side)
        return np.linalg.norm(one - other, axis=-1) > SAME * np.linalg.norm(one, axis=-1)

    def scores(self, points: NDArray, side: str) -> NDArray:
        """cos(h, positive centre) - cos(h, negative centre), float64 (prompts, levels); 0 at unused levels.

        Parameters
        ----------
        points : array, shape (prompts, levels, width)
        side : "harm" or "refusal"

        Raises
        ------
        InputError
            An activation is zero.
        """
        h = np.asarray(points, dtype=np.float64)
        norms = np.linalg.norm(h, axis=-1)
        if (norms == 0).any():
            row, level = np.argwhere(norms == 0)[0]
            raise InputError(
                f"the activation of prompt {row} is zero at level {level}",
                cause="a zero vector has no cosine; its token's embedding may never have been trained",
                next="leave the prompt out, or read another position",
            )
        pair = getattr(self, side)
        unit = pair / np.linalg.norm(pair, axis=-1, keepdims=True)
        cosines = np.einsum("nlw,klw->knl", h / norms[..., None], unit)
        return np.where(self.used(side), cosines[0] - cosines[1], 0.0)

    def average(self, scores: NDArray, side: str) -> NDArray:
        """Mean of `scores` over the used levels, float64 (prompts,): the Delta score.

        Raises
        ------
        InputError
            The centres are one point at every level.
        """
        used = self.used(side)
        if not used.any():
            raise InputError(
                f"the centres of {side} are one point at every level",
                cause="both buckets have the same means: the position does not depend on the prompt",
                next="check the spans (a question or system prompt given?) and the buckets",
            )
        return scores[:, used].mean(axis=1)

    def transferred(self) -> Centres:
        """The same centres for any model of the same shape, for example a fine-tuned copy."""
        return dataclasses.replace(self, model=None, template=None)

    def control(self, seed: int = 0) -> Centres:
        """The positive centre moved from the negative one along random vectors of the same lengths."""
        rng = np.random.default_rng(seed)
        moved = {}
        for side in SIDES:
            one, other = getattr(self, side)
            drawn = rng.standard_normal(one.shape)
            drawn *= np.linalg.norm(one - other, axis=-1, keepdims=True) / np.linalg.norm(drawn, axis=-1, keepdims=True)
            moved[side] = np.stack([other + drawn, other])
        return dataclasses.replace(self, **moved, about={**self.about, "control": seed})


def centres(
    host: Host,
    buckets: Buckets,
    *,
    balance: Sequence[str] = (),
    spans: Spans | None = None,
    batch_size: int | None = None,
) -> Centres:
    """Means of refused harmful and accepted harmless prompts, at t_inst and at t_post.

    Parameters
    ----------
    host : Host
    buckets : Buckets
        The other two buckets are not looked at: they are what beliefs are tested on.
    balance : sequence of str
        As in `difference`.
    spans : Spans, optional
    batch_size : int, optional

    Returns
    -------
    Centres

    Raises
    ------
    InputError
        One of the two buckets is empty; a mean is zero.

    Examples
    --------
    At level 0 nothing was read yet, so that both centres are one point there:

    >>> from markovsafety.interventions import centres, label, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> asked = ms.organism.prompts(n=12) + ms.organism.prompts(n=12, harmful=False)
    >>> buckets = label(host, asked, [True] * 12 + [False] * 12, tokens=ms.organism.REFUSAL_IDS)
    >>> means = centres(host, buckets)
    >>> means.counts, means.used("refusal")
    ((12, 12), array([False,  True,  True,  True,  True]))
    """
    sides = [buckets.refused_harmful, buckets.accepted_harmless]
    found = [states(host, p, spans=spans, batch_size=batch_size) for p in sides]
    means = np.stack([cell_mean(f, p, balance) for f, p in zip(found, sides)])
    model, template = host.identity
    counts = (len(sides[0]), len(sides[1]))
    return Centres(means[:, :, 0], means[:, :, 1], counts, model, template, {"balance": list(balance)})


@dataclass(frozen=True, eq=False)
class Beliefs:
    """What a model believes of prompts and is about to do with them.

    Attributes
    ----------
    prompts : tuple
    harm, refusal : float64 array, shape (prompts,)
        Both Delta scores: differences of cosines, averaged over the levels that are used.
    harm_by_level, refusal_by_level : float64 array, shape (prompts, levels)

    Examples
    --------
    >>> from markovsafety.interventions import believe, centres, label, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> asked = ms.organism.prompts(n=12) + ms.organism.prompts(n=12, harmful=False)
    >>> buckets = label(host, asked, [True] * 12 + [False] * 12, tokens=ms.organism.REFUSAL_IDS)
    >>> believe(host, centres(host, buckets), ms.organism.prompts(n=6, seed=1))
    <Beliefs of 6 prompts: mean harm +0.5..., mean refusal +0.4...>
    """

    prompts: tuple[Any, ...]
    harm: NDArray
    refusal: NDArray
    harm_by_level: NDArray
    refusal_by_level: NDArray

    def __repr__(self) -> str:
        means = (f"mean {name} {getattr(self, name).mean():+.2f}" for name in SIDES)
        return f"<Beliefs of {len(self.prompts)} prompts: {', '.join(means)}>"


def believe(
    host: Host,
    means: Centres,
    prompts: Sequence[Any],
    *,
    spans: Spans | None = None,
    edit: Edit | None = None,
    batch_size: int | None = None,
) -> Beliefs:
    """Both Delta scores of prompts.

    Parameters
    ----------
    host : Host
        The model that the centres were made with; for another one say ``means.transferred()``.
    means : Centres
    prompts : sequence of records, texts or ids
        Of bare ones (`label`) only harmfulness can be read: their refusal is nan.
    spans, edit, batch_size
        As in `states`.

    Returns
    -------
    Beliefs

    Raises
    ------
    InputError
        Another model, an activation that is zero, or no level that tells the centres apart.

    Notes
    -----
    arXiv 2507.11878, equations of Delta_harmful and Delta_refuse: all levels weigh alike. We leave out levels where the
    two centres are one point (level 0 at t_post always, its token is the same for all prompts), which the mean over all
    levels would only scale.

    Examples
    --------
    Jailbroken prompts are still believed harmful, and no longer refused:

    >>> from markovsafety.interventions import believe, centres, label, open_host
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> asked = ms.organism.prompts(n=12) + ms.organism.prompts(n=12, harmful=False)
    >>> buckets = label(host, asked, [True] * 12 + [False] * 12, tokens=ms.organism.REFUSAL_IDS)
    >>> beliefs = believe(host, centres(host, buckets), ms.organism.prompts(n=6, marker="jailbreak"))
    >>> np.sign(beliefs.harm), np.sign(beliefs.refusal)
    (array([1., 1., 1., 1., 1., 1.]), array([-1., -1., -1., -1., -1., -1.]))
    """
    check_identity(means.model, means.template, host, "the belief centres", ".transferred()")
    prompts = listed(prompts)
    cut = np.array([isinstance(p, dict) and bool(p.get("bare")) for p in prompts], dtype=bool)
    harm, refusal = (np.full((len(prompts), pair.shape[1]), np.nan) for pair in (means.harm, means.refusal))
    for rows, positions in ((np.flatnonzero(~cut), POSITIONS), (np.flatnonzero(cut), POSITIONS[:1])):
        if not len(rows):
            continue
        group = [prompts[i] for i in rows.tolist()]
        read = states(host, group, positions, spans=spans, edit=edit, batch_size=batch_size)
        harm[rows] = means.scores(read[:, :, 0], "harm")
        if len(positions) > 1:
            refusal[rows] = means.scores(read[:, :, 1], "refusal")
    averages = [means.average(scores, side) for side, scores in (("harm", harm), ("refusal", refusal))]
    return Beliefs(tuple(prompts), averages[0], averages[1], harm, refusal)


def belief_table(
    beliefs: Beliefs, buckets: Buckets, *, threshold: float = 0.0, level: float = 0.95
) -> list[dict[str, Any]]:
    """Believed harmful or not x refused or not: how many prompts, over all and by category.

    Parameters
    ----------
    beliefs : Beliefs
    buckets : Buckets
        Of the same prompts.
    threshold : float
        Believed harmful are prompts with a larger Delta_harmful.
    level : float

    Returns
    -------
    list of dict
        "category" ("all" first), "believed" and "refused" (bool), "harmful" (how many of the cell are, by ground
        truth), "prompts", and "share": a Bound, the share of the category's decided prompts.

    Raises
    ------
    InputError
        Beliefs of other prompts.

    Examples
    --------
    Of 20 prompts 10 are harmful and refused, 5 are harmful, believed so, and answered all the same:

    >>> from markovsafety.interventions import Beliefs, Buckets, belief_table
    >>> buckets = Buckets(range(20), harmful=[1] * 15 + [0] * 5, refusal=[0.9] * 10 + [0.1] * 10)
    >>> delta = np.array([0.4] * 15 + [-0.5] * 5)
    >>> table = belief_table(Beliefs(buckets.prompts, delta, delta, delta[:, None], delta[:, None]), buckets)
    >>> for row in table:
    ...     print(row["believed"], row["refused"], row["prompts"], row["harmful"])
    True True 10 10
    True False 5 5
    False True 0 0
    False False 5 0
    >>> print(table[1]["share"])
    share = 0.25   95 % [0.0866, 0.491]
    because: sampling 0.2; judge, lumping, model, truncation, rounding not assessed
    """
    if len(beliefs.prompts) != len(buckets.prompts):
        raise InputError(
            f"{len(beliefs.prompts)} beliefs stand beside {len(buckets.prompts)} behaviours",
            cause="each prompt has one of each",
            next="believe(host, centres, buckets.prompts)",
        )
    believed, kinds = beliefs.harm > threshold, buckets.categories
    groups = [("all", np.ones(len(kinds), bool))]
    groups += [(str(c), kinds == c) for c in sorted(set(kinds)) if len(set(kinds)) > 1]
    rows = []
    for name, members in groups:
        decided = members & ~buckets.undecided
        for said in (True, False):
            for refused in (True, False):
                cell = decided & (believed == said) & (buckets.refused == refused)
                share = clustered(cell[decided], np.ones(int(decided.sum())), level, "share")
                told = {"category": name, "believed": said, "refused": refused, "prompts": int(cell.sum())}
                rows.append({**told, "harmful": int(buckets.harmful[cell].sum()), "share": share})
    return rows
