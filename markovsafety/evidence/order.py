"""Order: how much of the answer so far must a state remember?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, encode
from ..chains import KGram
from ..chains.states import map_name
from ..errors import InputError
from .findings import CLUSTERS, Finding, rows_alike
from .paired import cluster_t
from .walks import Walks, walks

__all__ = ["SMOOTHING", "Orders", "one_more", "orders"]

SMOOTHING = 1.0
"""Pseudo-tokens by which the law of the next token in a state is drawn towards that over all states."""


@dataclass(frozen=True, eq=False)
class Orders:
    """Maps of growing memory beside each other.

    Parameters
    ----------
    table : list of dict
        One row per map: map, states, parameters, loglik (of the fit, in nats), aic, bic, g2, df, p (of the step from
        the map before it), held_out (log-likelihood per held-out token, in nats), unseen (share of held-out tokens in
        states never seen), gain (Bound: held-out nats per token more than the map before it).
    prefers : dict
        Map that aic, bic and held_out choose.
    text : str

    Examples
    --------
    >>> import random
    >>> rng, word = random.Random(0), ms.organism.WORDS.index
    >>> asked = [ms.organism.draw_prompt(rng) for _ in range(80)]
    >>> laws = [ms.organism.grammar("shallow", prompt.context) for prompt in asked]
    >>> said = [[word(w) for w in law.sample(rng)] for law in laws]
    >>> rolls = ms.judge(ms.Rollouts.of(said, prompt_id=range(80)), "organism")
    >>> found: ms.evidence.Orders = ms.evidence.orders(rolls[:40], rolls[40:])
    >>> found.prefers
    {'aic': 'KGram(5)', 'bic': 'KGram(5)', 'held_out': 'KGram(1)'}
    """

    table: list[dict[str, Any]]
    prefers: dict[str, str]
    text: str

    def __str__(self) -> str:
        head = ["map", "states", "G2", "df", "p", "AIC", "BIC", "held-out nats/token", "gain", "unseen"]
        rows = [head]
        for r in self.table:
            first = r["gain"] is None
            step = ["", "", ""] if first else [f"{r['g2']:.0f}", f"{r['df']:.0f}", f"{r['p']:.2g}"]
            gain = "" if first else f"{r['gain'].value:+.4f} [{r['gain'].lower:+.4f}, {r['gain'].upper:+.4f}]"
            fits = [f"{r[name]:.0f}" for name in ("aic", "bic")]
            rows.append([r["map"], str(r["states"]), *step, *fits, f"{r['held_out']:.4f}", gain])
            rows[-1].append(f"{100 * r['unseen']:.1f} %")
        sizes = [max(len(row[j]) for row in rows) for j in range(len(head))]
        return "\n".join([self.text, *("  " + "  ".join(c.rjust(s) for c, s in zip(row, sizes)) for row in rows)])

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data: table, prefers, text."""
        return {k: encode(getattr(self, k)) for k in ("table", "prefers", "text")}


def one_more(w: Walks, *, level: float = 0.95) -> Finding:
    """Whether the state before this one matters to what comes next: a chain of order 1 in these states, or 2?

    Parameters
    ----------
    w : Walks
    level : float

    Returns
    -------
    Finding
        Without an effect on harm (the other findings and the held-out prefixes give it); its table has one row: g2,
        df, p, aic and bic (of the longer memory less the shorter; negative favours the longer), states, and gain
        (Bound: nats per step by which the longer memory foretells the next state better, in prompts that its rows do
        not come from). The verdict is "within" where p is at least 1 - level, "off" where it is less and the gain is
        above 0, else "cannot tell": the rows differ, but there are too few rollouts to make use of it.

    Notes
    -----
    Likelihood ratio of T. W. Anderson and L. A. Goodman (Annals of Mathematical Statistics 28 (1957) 89), degrees of
    freedom counted on the observed support; p is that of `rows_alike`, since the tables are sparse. For k-grams the
    state with the one before is the (k+1)-gram. For the gain, prompts are split at random: the
    rows of one half foretell the other.
    """
    if len(w.row) == 0:
        return Finding("order", "not tested", "Nothing was sampled.")
    alike = rows_alike(w.state, w.before, w.target)
    if alike.states == 0:
        return Finding("order", "not tested", "No state was visited from two others and left for two others.")
    aic, bic = 2 * alike.df - alike.g2, float(np.log(len(w.row)) * alike.df - alike.g2)
    longer = np.unique(w.state * (w.size + 1) + w.before, return_inverse=True)[1].reshape(-1)
    said = np.where(w.token >= 0, w.target, -1)
    difference = np.zeros(len(w.row))
    halves = np.random.default_rng(0).permutation(w.prompts) % 2
    for half in (0, 1):
        test = halves[w.prompt[w.row]] == half
        fit = ~test & (said >= 0)
        for sign, state in ((-1, w.state), (1, longer)):
            difference[test] += sign * _foretold(state[fit], said[fit], state[test], said[test])[0]
    gain = _gain(difference, w, level)
    table = [{"g2": alike.g2, "df": alike.df, "p": alike.p, "aic": aic, "bic": bic, "states": alike.states}]
    table[0]["gain"] = gain
    chosen = [f"{n} the {'longer' if v < 0 else 'shorter'}" for n, v in (("AIC", aic), ("BIC", bic))]
    text = (
        f"One more state of memory: G2 = {alike.g2:.0f} on {alike.df:.0f} degrees of freedom, p = {alike.p:.2g}; "
        f"{', '.join(chosen)} memory; {gain.value:+.4f} [{gain.lower:+.4f}, {gain.upper:+.4f}] nats per step in other "
        "prompts."
    )
    verdict = "within" if alike.p >= 1 - level else "off" if gain.lower > 0 else "cannot tell"
    return Finding("order", verdict, text, None, alike.p, table)


def orders(fit: Any, held_out: Any, maps: Sequence[Any] | None = None, *, level: float = 0.95) -> Orders:
    """How well state maps foretell the next token, on the rollouts they are fitted to and on others.

    Parameters
    ----------
    fit, held_out : Rollouts
        Judged, of different prompts.
    maps : sequence of StateMap, optional
        From short to long memory; k-grams of order 1 to 5 if not given.
    level : float

    Returns
    -------
    Orders

    Raises
    ------
    InputError
        If there is no map, or rollouts are not judged.

    Notes
    -----
    All maps are asked for the same thing, the law of the next token after a prefix, so that maps of any kind can stand
    beside each other. On the fit: log-likelihood of the relative frequencies, parameters counted on the observed
    support; AIC (H. Akaike, IEEE Trans. Automatic Control 19 (1974) 716), BIC (G. Schwarz, Annals of Statistics 6
    (1978) 461; R. W. Katz, Technometrics 23 (1981) 243, for chains). Both take transitions for independent trials,
    which answers to one prompt are not; the held-out likelihood does not, and its gain is clustered by prompt. There a
    state's law is (N(s, y) + a q(y)) / (N(s) + a) with a = `SMOOTHING` and q(y) = (N(y) + 1) / (N + V + 1) over the V
    tokens of the fit, one share left for any other.

    Examples
    --------
    Forty answers of the exact language are too few for a memory of two tokens, whatever AIC and BIC say:

    >>> import random
    >>> rng, word = random.Random(0), ms.organism.WORDS.index
    >>> asked = [ms.organism.draw_prompt(rng) for _ in range(80)]
    >>> laws = [ms.organism.grammar("shallow", prompt.context) for prompt in asked]
    >>> said = [[word(w) for w in law.sample(rng)] for law in laws]
    >>> rolls = ms.judge(ms.Rollouts.of(said, prompt_id=range(80)), "organism")
    >>> ms.evidence.orders(rolls[:40], rolls[40:], maps=[ms.KGram(k) for k in (1, 2, 3)])
    Held-out tokens are best foretold by KGram(1); AIC prefers KGram(3), BIC KGram(3).
           map  states   G2   df        p   AIC   BIC  held-out nats/token                        gain  unseen
      KGram(1)      81                     1637  2194              -2.0862                               6.5 %
      KGram(2)     200  519  441  0.00016  1105  1635              -2.3329  -0.2467 [-0.3430, -0.1503]  18.9 %
      KGram(3)     312  179  147     0.97   932  1476              -2.7824  -0.4495 [-0.5292, -0.3697]  33.8 %
    """
    maps = [KGram(k) for k in range(1, 6)] if maps is None else list(maps)
    if not maps:
        raise InputError("There is no state map.", cause="The list is empty.", next="Pass at least one.")
    table: list[dict[str, Any]] = []
    last: tuple[NDArray, Walks] | None = None
    for states in maps:
        a, b = walks(fit, states), walks(held_out, states)
        row, scores = _scored(a, b, map_name(states))
        row |= {"gain": None, "g2": None, "df": None, "p": None}
        if last is not None:
            row["gain"] = _gain(scores - last[0], b, level)
            row |= _step(last[1], a)
        table.append(row)
        last = scores, a
    prefers = {name: min(table, key=lambda r, n=name: r[n])["map"] for name in ("aic", "bic")}
    prefers["held_out"] = max(table, key=lambda r: r["held_out"])["map"]
    text = (
        f"Held-out tokens are best foretold by {prefers['held_out']}; AIC prefers {prefers['aic']}, BIC "
        f"{prefers['bic']}."
    )
    return Orders(table, prefers, text)


def _step(short: Walks, long: Walks) -> dict[str, float]:
    """Likelihood ratio between two maps on the same tokens, given the states of the shorter."""
    spoken = short.token >= 0
    alike = rows_alike(short.state[spoken], long.state[spoken], short.token[spoken])
    return {"g2": alike.g2, "df": alike.df, "p": alike.p}


def _scored(a: Walks, b: Walks, name: str) -> tuple[dict[str, Any], NDArray]:
    """The row of one map, and the log-probability of every held-out visit's token (0 where none was sampled)."""
    spoken = a.token >= 0
    state, token = a.state[spoken], a.token[spoken]
    _, cells, count = np.unique(np.stack([state, token]), axis=1, return_inverse=True, return_counts=True)
    here = np.bincount(state, minlength=a.size)
    loglik = float(np.log(count[cells.reshape(-1)] / here[state]).sum())
    parameters = len(count) - int((here > 0).sum())
    known = {label: i for i, label in enumerate(a.labels)}
    place = np.array([known.get(x, -1) for x in b.labels], dtype=np.int64)[b.state]
    scores, new = _foretold(state, token, place, b.token)
    said = b.token >= 0
    total = max(float((b.mass * said).sum()), 1e-300)
    row = {
        "map": name,
        "states": int((here > 0).sum()),
        "parameters": parameters,
        "loglik": loglik,
        "aic": 2 * parameters - 2 * loglik,
        "bic": float(np.log(max(len(token), 1)) * parameters - 2 * loglik),
        "held_out": float((b.mass * scores).sum() / total),
        "unseen": float((b.mass * (said & new)).sum() / total),
    }
    return row, scores


def _foretold(state: NDArray, token: NDArray, place: NDArray, want: NDArray) -> tuple[NDArray, NDArray]:
    """Smoothed log-probability of each token `want` in state `place` (-1: a state never seen), by the counts of `token`
    in `state`, 0 where `want` is -1; and whether the state was never seen."""
    V = int(max(token.max(initial=-1), want.max(initial=-1))) + 1
    keys, count = np.unique(state * V + token, return_counts=True)
    here, whole = np.bincount(state, minlength=int(place.max(initial=0)) + 1), np.bincount(token, minlength=V)
    q = (whole + 1) / (len(token) + (whole > 0).sum() + 1)
    key = np.where((place >= 0) & (want >= 0), place * V + want, -1)
    at = np.minimum(np.searchsorted(keys, key), max(len(keys) - 1, 0))
    n = np.where(keys[at] == key, count[at], 0) if len(keys) else np.zeros(len(key))
    visits = np.where(place >= 0, here[np.maximum(place, 0)], 0)
    scores = np.log((n + SMOOTHING * q[np.maximum(want, 0)]) / (visits + SMOOTHING))
    return np.where(want >= 0, scores, 0.0), visits == 0


def _gain(more: NDArray, b: Walks, level: float) -> Bound:
    """Nats per token by which one map foretells better than another, clustered by prompt."""
    said = (b.token >= 0) * b.mass
    total = said.sum()
    value = float((more * b.mass).sum() / total) if total > 0 else np.nan
    half = np.inf
    if b.prompts >= CLUSTERS and total > 0:
        half = cluster_t(b.by_prompt(more * b.mass - value * said) / total, level)
    reasons = {"sampling": half}
    return Bound(value, value - half, value + half, level, reasons, None, {"name": "nats per token"})
