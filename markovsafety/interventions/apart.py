"""Are harmfulness and refusal encoded apart? Where both positions tell the same, they are not: a finding like any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .beliefs import SAME
from .buckets import BUCKETS, Buckets
from .differences import states
from .directions import POSITIONS
from .separation import auc, silhouette

if TYPE_CHECKING:
    from .host import Host

__all__ = ["Separation", "separate"]


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

    Examples
    --------
    >>> inst = {"position": "t_inst", "level": 3, "mismatch": ms.Bound(0.97, 0.6, 1.0), "harm": 0.8, "refusal": 0.1}
    >>> post = {"position": "t_post", "level": 2, "mismatch": ms.Bound(0.0, 0.0, 0.3), "harm": 0.1, "refusal": 0.9}
    >>> found = ms.interventions.Separation("separated", "harm at t_inst, refusal at t_post", [inst, post])
    >>> found
    <Separation: separated: harm at t_inst, refusal at t_post>
    >>> found.best("t_post")["level"]
    2
    """

    verdict: str
    reason: str
    rows: list[dict[str, Any]]

    def __bool__(self) -> bool:
        return self.verdict == "separated"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"

    def __repr__(self) -> str:
        return f"<Separation: {self}>"

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

    Examples
    --------
    Jailbreaks are harmful and answered, innocent prompts with a frightening word are refused, and tell the two apart:

    >>> from markovsafety.interventions import label, open_host, separate
    >>> host = open_host(ms.organism.model_path("shallow"))
    >>> kinds = [(True, None), (False, None), (True, "jailbreak"), (False, "trigger")]
    >>> def labelled(seed):
    ...     asked = [(p, h) for h, m in kinds for p in ms.organism.prompts(n=12, harmful=h, marker=m, seed=seed)]
    ...     return label(host, *zip(*asked), tokens=ms.organism.REFUSAL_IDS)
    >>> print(separate(host, labelled(seed=0), labelled(seed=1)))
    separated: accepted harmful prompts look more harmful than refused harmless ones with
    AUC 0.9... at t_inst and 0.00 at t_post, at the best level of each
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
