"""Beliefs: how near a prompt's activations are to those of harmful and of refused prompts, over all levels.

Harmfulness is believed at t_inst, refusal is decided at t_post. Beside what the model does, that makes a 2 x 2 table:
believed harmful or not x refused or not; and where both positions tell the same, the two are not separated, which is a
finding like any other.
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
from .buckets import BUCKETS, Buckets, listed
from .differences import cell_mean, states
from .directions import POSITIONS
from .edits import Edit, check_identity
from .positions import Spans
from .separation import auc, silhouette

if TYPE_CHECKING:
    from .host import Host

__all__ = ["Beliefs", "Centres", "Separation", "belief_table", "believe", "centres", "separate"]

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
    """

    prompts: tuple[Any, ...]
    harm: NDArray
    refusal: NDArray
    harm_by_level: NDArray
    refusal_by_level: NDArray


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


@dataclass(frozen=True, eq=False)
class Separation:
    """Whether harmfulness is encoded at t_inst and refusal at t_post.

    Attributes
    ----------
    verdict : "separated" or "not separated"
    reason : str
    rows : list of dict
        One per position and level: "position", "level", "mismatch" (Bound; AUC of accepted harmful over refused
        harmless prompts along the plain difference: 1 where harmfulness is encoded, 0 where refusal is), "control" (the
        same along a random vector: clusters far apart are separated by nearly any vector, to a random side, so that
        it is the agreement of levels and positions that tells), "harm" and "refusal" (silhouettes of the four buckets
        by either).
    """

    verdict: str
    reason: str
    rows: list[dict[str, Any]]

    def __bool__(self) -> bool:
        return self.verdict == "separated"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"

    def best(self, position: str) -> dict[str, Any]:
        """The row where the position separates best: t_inst by harmfulness, t_post by refusal."""
        sign = 1 if position == "t_inst" else -1
        name = "harm" if position == "t_inst" else "refusal"
        return max(
            (r for r in self.rows if r["position"] == position), key=lambda r: (sign * r["mismatch"].value, r[name])
        )


def separate(
    host: Host, fitted: Buckets, held: Buckets, *, seed: int = 0, level: float = 0.95, batch_size: int | None = None
) -> Separation:
    """Are harmfulness and refusal encoded apart?

    Parameters
    ----------
    host : Host
    fitted : Buckets
        The directions are the plain differences of its refused harmful and accepted harmless prompts.
    held : Buckets
        Other prompts, in all four buckets.
    seed : int
        Of the random control.
    level : float
        Confidence over all levels and both positions together.
    batch_size : int, optional

    Returns
    -------
    Separation

    Raises
    ------
    InputError
        An empty bucket.
    """
    read = [states(host, p, batch_size=batch_size) for p in (fitted.refused_harmful, fitted.accepted_harmless)]
    vectors = read[0].mean(axis=0, dtype=np.float64) - read[1].mean(axis=0, dtype=np.float64)
    points = [states(host, held.get(name), batch_size=batch_size) for name in BUCKETS]
    every = np.concatenate(points)
    harmful = np.repeat([True, True, False, False], [len(p) for p in points])
    refused = np.repeat([True, False, True, False], [len(p) for p in points])
    drawn = np.random.default_rng(seed).standard_normal(vectors.shape)
    apart = np.linalg.norm(vectors, axis=-1) > SAME * np.linalg.norm(every, axis=-1).mean(axis=0)
    each = 1 - (1 - level) / max(int(apart.sum()), 1)
    rows = []
    for place, position in enumerate(POSITIONS):
        for at in np.flatnonzero(apart[:, place]):
            accepted, innocent = (points[i][:, at, place].astype(np.float64) for i in (1, 2))
            along, aside, x = vectors[at, place], drawn[at, place], every[:, at, place]
            row: dict[str, Any] = {"position": position, "level": int(at)}
            row["mismatch"] = auc(accepted @ along, innocent @ along, each, "mismatch AUC")
            row["control"] = auc(accepted @ aside, innocent @ aside, each, "mismatch AUC, random vector")
            rows.append(row | {"harm": silhouette(x, harmful), "refusal": silhouette(x, refused)})
    return Separation(*_verdict(rows), rows)


def _verdict(rows: list[dict[str, Any]]) -> tuple[str, str]:
    inst = [r["mismatch"] for r in rows if r["position"] == "t_inst"]
    post = [r["mismatch"] for r in rows if r["position"] == "t_post"]
    if not inst or not post:
        return "not separated", "at one of the positions no level tells refused harmful from accepted harmless prompts"
    high, low = max(inst, key=lambda b: b.lower), min(post, key=lambda b: b.upper)
    told = (
        f"accepted harmful prompts look more harmful than refused harmless ones with AUC {high.value:.2f} at t_inst "
        f"and {low.value:.2f} at t_post, at the best level of each"
    )
    return ("separated" if high.lower > 0.5 and low.upper < 0.5 else "not separated"), told
