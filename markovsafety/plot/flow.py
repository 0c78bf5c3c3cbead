"""Probability mass on its way through a chain, token by token: a moving picture for teaching.

Every frame is the law of the chain after that many tokens, start P^t (of a layered chain start P_0 P_1 ... P_t-1), with
the target made absorbing, so that what has arrived there are first hits. States that are not drawn are one bubble.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import networkx as nx
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ..bound import Bound
from ..chains import Chain
from ..errors import InputError
from ..hitting import hitting_probability
from .folding import first_hits, folded
from .moving import drawing
from .style import state_text

__all__ = ["Flow", "flow"]

ELSEWHERE = "states not shown"
ALIVE = 0.01  # what may be on its way when the picture ends
LONGEST = 48  # tokens, unless more are asked for


@dataclass(frozen=True, eq=False)
class Flow:
    """Mass by token and place, and the moving picture of it: the last line of a notebook's cell shows it.

    Parameters
    ----------
    mass : array, shape (tokens + 1, places)
        Share of the answers in each place after 0, 1, ... tokens; every row sums to 1.
    passages : array, shape (tokens, places, places)
        Share of the answers that go from one place to another with each token.
    places : tuple of str
        States as text, then outcomes; what is not drawn is ``"states not shown"``.
    ends : dict of str to int
        Outcome -> its place.
    harm : Bound
        Probability to reach the target ever.
    html : str
        The picture: SVG that moves by CSS, with a slider where scripts run. It loads nothing.

    Examples
    --------
    >>> moving = ms.plot.flow(ms.toy.shallow(2), tokens=12)
    >>> type(moving).__name__, moving.mass.shape
    ('Flow', (13, 5))
    """

    mass: NDArray[np.float64]
    passages: NDArray[np.float64]
    places: tuple[str, ...]
    ends: Mapping[str, int]
    harm: Bound
    html: str

    def _repr_html_(self) -> str:
        return self.html

    def columns(self) -> dict[str, list[Any]]:
        """A row for each token and place, as of `data`."""
        tokens, places = (x.ravel() for x in np.indices(self.mass.shape))
        outcome = set(self.ends.values())
        return {
            "series": [self.places[p] for p in places],
            "kind": ["outcome" if p in outcome else "state" for p in places],
            "after (tokens)": tokens.tolist(),
            "value (share of answers)": self.mass.ravel().tolist(),
        }

    def save(self, path: str | Path) -> str:
        """Write the picture as a page of its own, whole or not at all.

        Parameters
        ----------
        path : path
            Ending in .html; its folder is made.

        Returns
        -------
        str
            The path.

        Raises
        ------
        InputError
            The ending is another one, or the file cannot be written.
        """
        from ..files import atomic

        if Path(path).suffix != ".html":
            raise InputError(f"{path} is no page.", cause="The picture moves in a browser.", next="Use .html.")
        head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Mass in the chain</title>'
        head += '<meta name="viewport" content="width=device-width"></head><body data-theme="auto">'
        with atomic(path) as part:
            part.write_text(f"{head}<main><h1>Mass in the chain</h1>{self.html}</main></body></html>\n", "utf-8")
        return str(path)


def flow(
    chain: Chain,
    tokens: int | None = None,
    *,
    top: int = 10,
    target: str = "harm",
    words: Any = None,
    pace: float = 0.7,
) -> Flow:
    """Probability mass flowing through the chain, token by token: states as bubbles by area, outcomes as tanks.

    Parameters
    ----------
    chain : Chain
        With a start law.
    tokens : int, optional
        How many; until less than 1 % of the answers are on their way (at most 48) if not given, all layers of a layered
        chain. After its last layer what is on its way has been truncated.
    top : int
        Number of states drawn, placed as by `chain`; the others are one bubble.
    target : str
        Outcome that counts as harm: made absorbing, so that its tank holds first hits. The mark beside it is the
        probability to get there ever, with its interval.
    words : sequence or callable, optional
        Token id -> text, to read the labels of k-gram states.
    pace : float
        Seconds per token.

    Returns
    -------
    Flow
        Shown by Jupyter; `Flow.save` makes a page. It rests on its last frame where the reader's system asks for less
        motion.

    Raises
    ------
    InputError
        The chain has no start law, no such outcome, or fewer layers than tokens were asked for; a number of tokens or
        states, or a pace, that is none.

    Examples
    --------
    >>> moving = ms.plot.flow(ms.toy.shallow(3), tokens=20)
    >>> print(f"{moving.mass[20, moving.ends['harm']]:.3f} of {moving.harm.value:.3f}")
    0.241 of 0.284
    """
    if not 0 < pace < np.inf:
        raise InputError(f"pace is {pace}.", cause="It is seconds per token.", next="Pass a number above 0.")
    graph = folded(chain, top, target)
    harm, chain = hitting_probability(chain, target).at_start, first_hits(chain, target)
    steps = _steps(chain, tokens)
    said = {n: n if isinstance(n, str) else state_text(chain.states[n], words) for n in graph if n != "start"}
    nodes = sorted(said, key=lambda n: isinstance(n, str))
    into = _groups(chain, nodes)
    mass, passages = _run(chain, steps, into)
    places = [said[n] for n in nodes] + [ELSEWHERE]
    if mass[:, -1].max() <= 1e-12:
        mass, passages, places = mass[:, :-1], passages[:, :-1, :-1], places[:-1]
    ends = {n: i for i, n in enumerate(nodes) if isinstance(n, str)}
    if graph.has_node("start"):
        graph = nx.DiGraph(graph.subgraph([n for n in graph if n != "start"]))
    html = drawing(graph, nodes, places, ends, mass, passages, harm, target, pace)
    return Flow(mass, passages, tuple(places), MappingProxyType(ends), harm, html)


def _steps(chain: Chain, tokens: int | None) -> list[sp.csr_array]:
    """The matrix of each token."""
    if tokens is not None and not (tokens >= 1 and tokens == int(tokens)):
        raise InputError(
            f"tokens is {tokens}.", cause="Mass moves with a token.", next="Pass a whole number from 1 on."
        )
    if chain.is_layered:
        if tokens is not None and tokens > chain.n_layers:
            raise InputError(
                f"The chain has {chain.n_layers} layers, not {tokens}.", cause="It ends there.", next="Ask for fewer."
            )
        return list(chain.layers[:tokens])
    if tokens is None:
        now, tokens = np.asarray(chain.start), 0
        while tokens < LONGEST and now[~chain.outcome_mask].sum() > ALIVE:
            now, tokens = now @ chain.layers[0], tokens + 1
    return [chain.layers[0]] * max(tokens, 1)


def _groups(chain: Chain, nodes: list[Any]) -> sp.csr_array:
    """Which place a state belongs to, shape (n + 1, places): the last row is what was truncated, the last place the
    states that are not shown."""
    place = np.full(chain.n_states + 1, len(nodes))
    for i, node in enumerate(nodes):
        place[chain.outcomes.get(node, []) if isinstance(node, str) else node] = i
        if node == "truncated":
            place[-1] = i
    there = np.ones(len(place))
    return sp.csr_array((there, (np.arange(len(place)), place)), shape=(len(place), len(nodes) + 1))


def _run(chain: Chain, steps: list[sp.csr_array], into: sp.csr_array) -> tuple[NDArray, NDArray]:
    n = chain.n_states
    now = np.append(np.asarray(chain.start, dtype=float), 0.0)
    laws, moves = [now], []
    for t, P in enumerate(steps):
        step = sp.block_array([[P, None], [None, sp.eye_array(1)]], format="csr")
        if chain.is_layered and t + 1 == chain.n_layers:
            # After the last layer nothing is on its way any more.
            cut = np.append(~chain.outcome_mask, False)
            end = sp.csr_array((np.ones(n + 1), (np.arange(n + 1), np.where(cut, n, np.arange(n + 1)))))
            step = step @ end
        moves.append((into.T @ sp.diags_array(now) @ step @ into).toarray())
        now = now @ step
        laws.append(now)
    return np.array(laws) @ into, np.array(moves)
