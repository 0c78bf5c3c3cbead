"""Fine-tuning data through the filter: what is kept and dropped, how good that was where labels say so, and reviews.

The report has the AUC beside recall and false drops *at the threshold*, by category: a filter can rank perfectly and
still, at its threshold, pass a whole kind of poison. People may decide about rows (`write_review`, `read_review`);
their decisions come back by the rows' hashes and go before the filter's.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Bound, clustered, encode
from ..brief import brief
from ..errors import InputError
from ..files import atomic, inert
from ..rollouts.asked import read_prompts
from .data_filter import RefusalFilter
from .host import Host
from .pages import spanned
from .pairs import Pair
from .separation import auc

__all__ = ["DECISIONS", "Sifted", "read_review", "reviewed", "sift", "write_review", "write_sifted"]

DECISIONS = ("keep", "drop")
BINS = np.linspace(-1, 1, 41)
REVIEW = ("sha256", "decision", "filter", "cosine", "category", "prompt", "answer")


@dataclass(frozen=True, eq=False)
class Sifted:
    """What a filter did to pairs.

    Parameters
    ----------
    pairs : tuple of Pair
    scores : float64 array, shape (pairs,)
        Cosines with the feature.
    dropped : bool array, shape (pairs,)
        By the filter, or by a person where one has decided.
    filter : RefusalFilter
    level : float
        Of the intervals.
    decided : mapping of sha256 -> "keep" or "drop"
        What people said.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> filter = inside.fit_filter(host, organism.prompts(n=48), organism.prompts(n=48, harmful=False))
    >>> data = [{**p, "answer": "sure here is the plan", "harmful": h}
    ...         for h in (True, False) for p in organism.prompts(n=12, harmful=h, seed=1)]
    >>> sifted = inside.sift(host, filter, inside.read_pairs(data, host.engine.tokenizer))
    >>> sifted
    Sifted(pairs=tuple of 24, scores=float64 (24,), dropped=bool (24,), filter=RefusalFilter, level=0.95,
        decided={})
    >>> print(sifted.recall)
    recall at the threshold = 1   95 % [0.735, 1]   because: sampling 0.13; judge, lumping, model, truncation,
        rounding not assessed
    >>> len(sifted.kept), len(sifted.removed)
    (12, 12)
    """

    pairs: tuple[Pair, ...]
    scores: NDArray
    dropped: NDArray
    filter: RefusalFilter
    level: float = 0.95
    decided: Mapping[str, str] = field(default_factory=dict)

    __repr__ = brief

    @property
    def kept(self) -> list[Pair]:
        """The pairs to train on."""
        return [p for p, d in zip(self.pairs, self.dropped) if not d]

    @property
    def removed(self) -> list[Pair]:
        """The others."""
        return [p for p, d in zip(self.pairs, self.dropped) if d]

    @property
    def share(self) -> Bound:
        """Share of pairs that are dropped, clustered by prompt."""
        return self._rate(np.ones(len(self.pairs), bool), "share dropped")

    @property
    def recall(self) -> Bound | None:
        """Share of the pairs labelled harmful that are dropped; None without any."""
        return self._labelled(True, "recall at the threshold")

    @property
    def false_drops(self) -> Bound | None:
        """Share of the pairs labelled harmless that are dropped; None without any."""
        return self._labelled(False, "harmless dropped at the threshold")

    @property
    def auc(self) -> Bound | None:
        """Of the cosines, between the labelled kinds; None where one is missing."""
        up, down = (self.scores[self._where(kind)] for kind in (True, False))
        return auc(up, down, self.level, "AUC of the cosine") if len(up) and len(down) else None

    def by_category(self) -> dict[str, dict[str, Bound]]:
        """Recall and false drops of each category that has labels."""
        out: dict[str, dict[str, Bound]] = {}
        for category in sorted({p.category for p in self.pairs}):
            mine = np.array([p.category == category for p in self.pairs])
            for kind, name in ((True, "recall"), (False, "false_drops")):
                which = mine & self._where(kind)
                if which.any():
                    out.setdefault(category, {})[name] = self._rate(which, f"{name} of {category}")
        return out

    def histogram(self) -> dict[str, list[Any]]:
        """Counts of cosines in 40 bins from -1 to 1: "edges", "harmful", "harmless" and "unlabelled"."""
        kinds = {"harmful": self._where(True), "harmless": self._where(False), "unlabelled": self._where(None)}
        counts = {name: np.histogram(self.scores[which], BINS)[0].tolist() for name, which in kinds.items()}
        return {"edges": np.round(BINS, 3).tolist(), **counts}

    @property
    def notes(self) -> list[str]:
        """What a reader of the report must know."""
        out = []
        if self._where(None).any():
            out.append(f"{int(self._where(None).sum())} pairs have no label: recall and false drops are of the others")
        if self.auc is None:
            out.append("no AUC: labelled pairs of both kinds are needed")
        if self.dropped.all():
            out.append("every pair was dropped: there is nothing to train on")
        if self.decided:
            out.append(f"people decided about {len(self.decided)} of {len(self.pairs)} pairs")
        return out

    @property
    def verdict(self) -> str:
        """One line."""
        parts = [f"{len(self.kept)} of {len(self.pairs)} pairs kept"]
        for name, bound in (("recall", self.recall), ("harmless dropped", self.false_drops), ("AUC", self.auc)):
            parts.append(f"{name} " + ("unknown" if bound is None else spanned(bound)))
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain data: counts, shares, histogram, the filter; not the rows."""
        told = {name: getattr(self, name) for name in ("share", "recall", "false_drops", "auc", "notes", "verdict")}
        told |= {"pairs": len(self.pairs), "kept": len(self.kept), "categories": self.by_category()}
        return encode(told | {"histogram": self.histogram(), "filter": self.filter.to_json()})

    def _where(self, kind: bool | None) -> NDArray:
        return np.array([p.harmful is kind for p in self.pairs], bool)

    def _labelled(self, kind: bool, name: str) -> Bound | None:
        which = self._where(kind)
        return self._rate(which, name) if which.any() else None

    def _rate(self, which: NDArray, name: str) -> Bound:
        """Share dropped of some pairs; those with the same prompt stand or fall together."""
        _, prompt = np.unique([str(self.pairs[i].prompt) for i in np.flatnonzero(which)], return_inverse=True)
        events = np.bincount(prompt, self.dropped[which].astype(float))
        return clustered(events, np.bincount(prompt).astype(float), self.level, name)


def sift(host: Host, filter: RefusalFilter, pairs: Sequence[Pair], *, level: float = 0.95) -> Sifted:
    """Score pairs by the teacher, and drop those above the filter's threshold.

    Parameters
    ----------
    host : Host
        The teacher.
    filter : RefusalFilter
    pairs : sequence of Pair
    level : float
        Of the report's intervals.

    Returns
    -------
    Sifted

    Raises
    ------
    InputError
        No pairs, another teacher or template than the filter's, or a prompt that was put together by another template.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> filter = inside.fit_filter(host, organism.prompts(n=48), organism.prompts(n=48, harmful=False))
    >>> data = [{**p, "answer": "sure here is the plan", "harmful": h}
    ...         for h in (True, False) for p in organism.prompts(n=12, harmful=h, seed=1)]
    >>> sifted = inside.sift(host, filter, inside.read_pairs(data, host.engine.tokenizer))
    >>> print(sifted.verdict)
    12 of 24 pairs kept, recall 1.000 [0.735, 1.000], harmless dropped 0.000 [0.000, 0.265], AUC 1.000 [0.735,
        1.000]
    >>> print(sifted.false_drops)
    harmless dropped at the threshold = 0   95 % [0, 0.265]   because: sampling 0.13; judge, lumping, model,
        truncation, rounding not assessed
    """
    if not len(pairs):
        raise InputError("there are no pairs to filter", cause="the list is empty", next="give at least one")
    scores = filter.scores(host, [np.array(p.prompt) for p in pairs])
    return Sifted(tuple(pairs), scores, filter.drops(scores), filter, level)


def write_sifted(sifted: Sifted, folder: str | Path) -> list[Path]:
    """Write report.json, kept.jsonl and dropped.jsonl (each row with its place, hash and cosine).

    Parameters
    ----------
    sifted : Sifted
    folder : path

    Returns
    -------
    list of Path

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> filter = inside.fit_filter(host, organism.prompts(n=48), organism.prompts(n=48, harmful=False))
    >>> data = [{**p, "answer": "sure here is the plan", "harmful": h}
    ...         for h in (True, False) for p in organism.prompts(n=12, harmful=h, seed=1)]
    >>> sifted = inside.sift(host, filter, inside.read_pairs(data, host.engine.tokenizer))
    >>> [path.as_posix() for path in inside.write_sifted(sifted, "clean")]
    ['clean/report.json', 'clean/kept.jsonl', 'clean/dropped.jsonl']
    >>> from pathlib import Path
    >>> [len(Path(path).read_text().splitlines()) for path in ("clean/kept.jsonl", "clean/dropped.jsonl")]
    [12, 12]
    """
    place = Path(folder)
    rows: dict[bool, list[str]] = {False: [], True: []}
    for i, (pair, score, out) in enumerate(zip(sifted.pairs, sifted.scores, sifted.dropped)):
        said = {"row": i, "sha256": pair.sha256, "cosine": round(float(score), 6), **_told(pair)}
        rows[bool(out)].append(json.dumps(encode(said)))
    texts = {
        "report.json": json.dumps(sifted.to_json(), indent=1) + "\n",
        "kept.jsonl": "".join(line + "\n" for line in rows[False]),
        "dropped.jsonl": "".join(line + "\n" for line in rows[True]),
    }
    for name, text in texts.items():
        with atomic(place / name) as part:
            part.write_text(text, encoding="utf-8")
    return [place / name for name in texts]


def _told(pair: Pair) -> dict[str, Any]:
    """The record of a pair as it was read, so that what is kept can be read again."""
    if pair.source:
        return dict(pair.source)
    ids = {"prompt_tokens": list(pair.prompt), "answer": list(pair.answer)}
    return ids | {"harmful": pair.harmful, "category": pair.category}


# ------------------------------------------------------------------------------------------------------------- reviews


def write_review(sifted: Sifted, path: str | Path, *, n: int | None = None) -> int:
    """Write pairs for people to decide about, the most doubtful first.

    Parameters
    ----------
    sifted : Sifted
    path : path
        CSV or JSONL. The field ``decision`` is to be filled with keep or drop, or left empty.
    n : int, optional
        Only so many pairs; all by default.

    Returns
    -------
    int
        Pairs written; those that are equal count once.

    Notes
    -----
    Doubtful is what lies near the threshold. In a CSV a cell that a spreadsheet would take for a formula begins with an
    apostrophe; pairs are known by their hashes alone.

    Examples
    --------
    The most doubtful pairs first, with an empty column for what people decide:

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> filter = inside.fit_filter(host, organism.prompts(n=48), organism.prompts(n=48, harmful=False))
    >>> data = [{**p, "answer": "sure here is the plan", "harmful": h}
    ...         for h in (True, False) for p in organism.prompts(n=12, harmful=h, seed=1)]
    >>> sifted = inside.sift(host, filter, inside.read_pairs(data, host.engine.tokenizer))
    >>> inside.write_review(sifted, "review.csv", n=3)
    3
    >>> from pathlib import Path
    >>> for line in Path("review.csv").read_text().splitlines():
    ...     name, decision, said, cosine, category, prompt, answer = line.split(",")
    ...     print(f"{name[:6]:7} {decision:9} {said:7} {cosine[:6]:7} {prompt}")
    sha256  decision  filter  cosine  prompt
    97dd56            drop    0.8226  please v05 the weapon5 .
    048e64            keep    -0.195  kindly v16 some small fraud3 . thanks .
    930179            drop    0.8391  v10 some fraud2 for carol .
    """
    path, rows = Path(path), {}
    for i in np.argsort(np.abs(sifted.scores - sifted.filter.threshold), kind="stable"):
        pair = sifted.pairs[i]
        told = {"decision": sifted.decided.get(pair.sha256, ""), "filter": DECISIONS[int(sifted.dropped[i])]}
        told |= {"cosine": round(float(sifted.scores[i]), 6), "category": pair.category}
        told |= {k: pair.source.get(k, " ".join(map(str, getattr(pair, k)))) for k in ("prompt", "answer")}
        rows.setdefault(pair.sha256, {"sha256": pair.sha256, **told})
    chosen = list(rows.values())[:n]
    with atomic(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, REVIEW)
            writer.writeheader()
            writer.writerows({k: inert(v) for k, v in row.items()} for row in chosen)
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps(encode(row)) + "\n" for row in chosen)
        else:
            raise InputError(
                f"{path} is neither CSV nor JSONL", cause="the format is told by the name", next="name it *.csv"
            )
    return len(chosen)


def read_review(path: str | Path) -> dict[str, str]:
    """Decisions of people, by hash; rows without one are left out.

    Raises
    ------
    InputError
        A decision that is neither keep nor drop, two for one pair, or a row without hash.

    Examples
    --------
    >>> with open("review.csv", "w") as file:
    ...     for line in ("sha256,decision", "97dd56393e03,keep", "048e6406836e,", "930179708683,drop"):
    ...         print(line, file=file)
    >>> ms.interventions.read_review("review.csv")
    {'97dd56393e03': 'keep', '930179708683': 'drop'}
    """
    out: dict[str, str] = {}
    for i, row in enumerate(read_prompts(Path(path))):
        said = str(row.get("decision") or "").strip().lower()
        known = str(row.get("sha256") or "")
        if said and (said not in DECISIONS or not known or out.get(known, said) != said):
            raise InputError(
                f"row {i} of {path} has the decision {said!r} for {known[:12] or 'no pair'}",
                cause="a decision is keep or drop, one for each hash",
                next="correct it, or leave it empty",
            )
        if said:
            out[known] = said
    return out


def reviewed(sifted: Sifted, decisions: Mapping[str, str]) -> Sifted:
    """The same pairs with what people decided in place of what the filter said.

    Parameters
    ----------
    sifted : Sifted
    decisions : mapping of sha256 -> "keep" or "drop"
        Of `read_review`.

    Raises
    ------
    InputError
        A decision about a pair that is not among these.

    Examples
    --------
    Somebody looked at a pair that the filter had dropped, and keeps it:

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> filter = inside.fit_filter(host, organism.prompts(n=48), organism.prompts(n=48, harmful=False))
    >>> data = [{**p, "answer": "sure here is the plan", "harmful": h}
    ...         for h in (True, False) for p in organism.prompts(n=12, harmful=h, seed=1)]
    >>> sifted = inside.sift(host, filter, inside.read_pairs(data, host.engine.tokenizer))
    >>> decided = inside.reviewed(sifted, {sifted.removed[0].sha256: "keep"})
    >>> len(sifted.kept), len(decided.kept), decided.notes
    (12, 13, ['people decided about 1 of 24 pairs'])
    """
    hashes = [p.sha256 for p in sifted.pairs]
    foreign = sorted(set(decisions) - set(hashes))
    if foreign:
        raise InputError(
            f"{len(foreign)} decisions are about other pairs, the first about {foreign[0][:12]}",
            cause="the review was made of other data, or the data have changed since",
            next="write the review again, or give the data that it was made of",
        )
    dropped = [decisions[h] == "drop" if h in decisions else bool(d) for h, d in zip(hashes, sifted.dropped)]
    return replace(sifted, dropped=np.array(dropped, bool), decided={**sifted.decided, **decisions})
