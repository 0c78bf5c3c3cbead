"""Rollouts to report on, and a reader of the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from markovsafety.rollouts import Rollouts

EOS, REFUSE, HARM = 7, 8, 9
PROVENANCE = {
    "model": {
        "name": "/somewhere/on/this/machine/tiny",
        "path": "/somewhere/on/this/machine/tiny",
        "weights": {"sha256": "ab" * 32},
    },
    "engine": {"name": "jax", "dtype": "float32"},
    "sampling": {"seed": 5, "temperature": 1.0},
    "judge": {"name": "made up"},
}


def rollouts(
    harm: dict[int, float],
    *,
    prompts: int = 12,
    n: int = 6,
    categories: tuple[str, ...] = ("bio", "fraud"),
    truncated: bool = False,
    seed: int = 0,
) -> Rollouts:
    """Answers of small talk (tokens 0..6) that end in harm with probability harm[k], else in a refusal or well."""
    rng = np.random.default_rng(seed)
    answers, columns = [], {"prompt_id": [], "category": [], "prefill": [], "outcome": [], "hit": []}
    for k, p in harm.items():
        for prompt in range(prompts):
            for _ in range(n):
                talk = [0] * k + rng.integers(0, 7, rng.integers(1, 9)).tolist()
                outcome = 0 if rng.random() < p else int(rng.integers(1, 3))
                last = {0: HARM, 1: REFUSE, 2: EOS}[outcome]
                answers.append(talk if truncated else [*talk, last])
                columns["prompt_id"].append(prompt)
                columns["category"].append(categories[prompt % len(categories)])
                columns["prefill"].append(k)
                columns["outcome"].append(3 if truncated else outcome)
                columns["hit"].append(-1 if truncated else len(talk))
    columns["category"] = np.array(columns["category"], dtype=object)
    return Rollouts.of(answers, **columns, provenance=PROVENANCE)


SHALLOW = {0: 0.05, 1: 0.6, 3: 0.6}
DEEP = {0: 0.05, 1: 0.05, 3: 0.7}


class Page(HTMLParser):
    """Tags with attributes, the table cells by table id, and the text outside of styles and scripts."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: dict[str, list[list[str]]] = {}
        self.table = ""
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == [], f"unclosed {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)
        if tag == "table":
            self.table = dict(attrs).get("id") or "other"
            self.cells[self.table] = []
        elif tag == "tr":
            self.cells[self.table].append([])
        elif tag in ("td", "th"):
            self.cells[self.table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[self.table][-1][-1] += data


def strict(path: Path) -> Any:
    """JSON without the NaN and Infinity that Python would let pass."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
