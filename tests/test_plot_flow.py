"""The moving picture: its frames are the powers of the chain, and the page moves by exactly these numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import opened
from hypothesis import given
from hypothesis import strategies as st
from test_plot import MODEST, ladder, random_chain

import markovsafety as ms
from markovsafety import InputError, plot
from markovsafety.plot.flow import ELSEWHERE


def laws(chain: ms.Chain, tokens: int) -> np.ndarray:
    """start P^t with an absorbing target, by plain powers; in a last column what a last layer truncates."""
    now, harm = np.append(np.asarray(chain.start, dtype=float), 0.0), chain.outcomes["harm"]
    out = [now]
    for t in range(tokens):
        P = chain.layers[t if chain.is_layered else 0].toarray()
        P[harm] = np.eye(chain.n_states)[harm]
        law = now[:-1] @ P
        left = 0.0
        if chain.is_layered and t + 1 == chain.n_layers:
            left, law = law[~chain.outcome_mask].sum(), np.where(chain.outcome_mask, law, 0.0)
        now = np.append(law, now[-1] + left)
        out.append(now)
    return np.array(out)


@MODEST
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from(["one", "spread"]), st.booleans())
def test_frames_are_the_powers_of_the_chain(seed, top, start, layered):
    chain = random_chain(seed, layered=layered, start=start)
    moving = plot.flow(chain, tokens=6, top=top)
    want = laws(chain, 6)
    np.testing.assert_allclose(moving.mass.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(moving.passages.sum(axis=2), moving.mass[:-1], atol=1e-12)
    np.testing.assert_allclose(moving.passages.sum(axis=1), moving.mass[1:], atol=1e-12)
    seen = np.zeros(len(want))
    for place, name in enumerate(moving.places):
        if name == ELSEWHERE:
            continue
        states = chain.outcomes[name] if name in chain.outcomes else [-1 if name == "truncated" else int(name)]
        np.testing.assert_allclose(moving.mass[:, place], want[:, states].sum(axis=1), atol=1e-12)
        seen += moving.mass[:, place]
    hidden = moving.mass[:, -1] if moving.places[-1] == ELSEWHERE else 0.0
    np.testing.assert_allclose(seen + hidden, 1, atol=1e-12)


def test_harm_by_closed_form():
    moving = plot.flow(ms.toy.shallow(3), tokens=30)
    a, r = ms.toy.UNALIGNED
    aligned_a, aligned_r = ms.toy.ALIGNED
    alive = (1 - aligned_a - aligned_r) ** np.minimum(np.arange(30), 3) * (1 - a - r) ** np.maximum(
        np.arange(30) - 3, 0
    )
    hazard = np.where(np.arange(30) < 3, aligned_a, a)
    np.testing.assert_allclose(moving.mass[1:, moving.ends["harm"]], np.cumsum(alive * hazard), rtol=1e-12)
    assert moving.mass[-1, moving.ends["harm"]] < moving.harm.value


def test_what_has_hit_stays_hit():
    P = [[0.5, 0.3, 0.2], [0.0, 0.0, 1.0], [0.1, 0.0, 0.9]]  # the row of harm leads on, that of refusal leaks
    chain = ms.Chain(P, {"harm": 1, "refusal": 2}, start=0, states=["talk", "harm", "refusal"])
    moving = plot.flow(chain, tokens=5)
    harm = moving.mass[:, moving.ends["harm"]]
    assert (np.diff(harm) > 0).all()
    np.testing.assert_allclose(moving.mass[:, moving.places.index("talk")], laws(chain, 5)[:, 0], atol=1e-12)
    np.testing.assert_allclose(harm, laws(chain, 5)[:, 1], atol=1e-12)
    assert harm[2] == pytest.approx(0.3 + 0.5 * 0.3)
    with pytest.raises(InputError):
        plot.flow(chain, target="nothing")


def test_it_runs_until_little_is_on_its_way():
    moving = plot.flow(ladder())
    transient = [i for i in range(len(moving.places)) if i not in moving.ends.values()]
    left = moving.mass[:, transient].sum(axis=1)
    assert left[-1] <= 0.01 < left[-2]
    assert len(plot.flow(random_chain(1, layered=True)).mass) == 7


def keyframes(html: str) -> dict[str, list[tuple[float, str]]]:
    found = re.findall(r"@keyframes (\S+)\{((?:[\d.e-]+%\{[^}]*\})+)\}", html)
    return {name: [(float(a), b) for a, b in re.findall(r"([\d.e-]+)%\{([^}]*)\}", body)] for name, body in found}


def at_frame(stops: list[tuple[float, str]], percent: float) -> float:
    """The number in a rule at a time, between stops as a browser goes from one to the other."""
    times = np.array([t for t, _ in stops])
    numbers = [float(re.search(r"\(?(-?[\d.]+(?:e-?\d+)?)", text.split(":")[1])[1]) for _, text in stops]
    return float(np.interp(percent, times, numbers))


def test_the_page_moves_by_the_frames():
    moving = plot.flow(ms.toy.shallow(3), tokens=12, pace=0.5)
    rules = keyframes(moving.html)
    bubbles = re.findall(r'class="m bubble".*?animation-name:(\S+?);', moving.html)
    tanks = re.findall(r'class="m level".*?animation-name:(\S+?);', moving.html)
    states = [i for i in range(len(moving.places)) if i not in moving.ends.values()]
    assert len(bubbles) == len(states) == 4
    assert len(tanks) == len(moving.ends) == 2
    drawn = np.array([[at_frame(rules[n], 100 * k * 0.5 / 8.5) for n in (*bubbles, *tanks)] for k in range(13)])
    text = re.findall(r">([a-z]+ ?\d?)</text>", moving.html)
    order = [moving.places.index(t) for t in text if t in moving.places]
    shown = moving.mass[:, order]
    np.testing.assert_allclose(drawn[:, :4] ** 2, shown[:, :4], atol=1e-3)  # by area
    np.testing.assert_allclose(drawn[:, 4:], shown[:, 4:], atol=1e-3)
    values = re.findall(r'<text class="number" y="\d+">(0\.\d+|1\.0+)</text>', moving.html)
    assert values == [f"{x:.3f}" for i in order[4:] for x in moving.mass[:, i]]


class Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in ("input", "circle", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("input", "circle", "path", "rect"):
            assert self.open.pop() == tag


def test_the_page_is_whole_loads_nothing_and_respects_less_motion():
    html = plot.flow(ms.toy.ladder(8))._repr_html_()
    page = Loads()
    page.feed(html)
    assert page.open == page.found == []
    assert not re.search(r"https?:|//|@import|url\((?!#)", html)
    assert "prefers-reduced-motion:reduce" in html
    assert 'class="pause"' in html
    assert len(html) < 60_000


def test_labels_stay_inert():
    states = [(0,), (1,), "bad", "no"]
    P = [[0, 0.8, 0, 0.2], [0.2, 0, 0.3, 0.5], [0, 0, 0, 0], [0, 0, 0, 0]]
    chain = ms.Chain(P, {"harm": 2, "refusal": 3}, start=0, states=states)
    html = plot.flow(chain, words=["<script>x()</script>", "&amp;"]).html
    assert html.count("<script>") == 1
    assert "&lt;script&gt;x()" in html
    assert "&amp;amp;" in html


def test_it_is_saved_and_its_numbers_are_columns(tmp_path):
    moving = plot.flow(ladder(), tokens=3)
    text = (tmp_path / "a" / "flow.html").with_name("flow.html")
    assert moving.save(text) == str(text)
    assert moving.html in text.read_text("utf-8")
    columns = plot.data(moving)
    assert columns["value (share of answers)"][:4] == moving.mass[0].tolist()
    assert columns["after (tokens)"][-1] == 3
    assert plot.save(moving, tmp_path / "b" / "flow.html", csv=True).endswith("flow.html")
    assert (tmp_path / "b" / "flow.html").read_bytes() == text.read_bytes()
    assert len((tmp_path / "b" / "flow.csv").read_text().splitlines()) == 1 + moving.mass.size
    with pytest.raises(InputError, match="no page"):
        moving.save(tmp_path / "flow.gif")


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="no start law"):
        plot.flow(ladder(start=None))
    for what in ({"tokens": 2.5}, {"top": -3}, {"pace": 0.0}, {"pace": float("nan")}):
        with pytest.raises(InputError, match=f"{next(iter(what))} is "):
            plot.flow(ms.toy.shallow(3), **what)
    with pytest.raises(InputError, match="tokens is 0"):
        plot.flow(ladder(), tokens=0)
    with pytest.raises(InputError, match="6 layers, not 7"):
        plot.flow(random_chain(2, layered=True), tokens=7)


def test_a_browser_shows_the_frame_that_the_slider_asks_for(tmp_path):
    moving = plot.flow(ms.toy.shallow(3), tokens=8)
    page = Path(moving.save(tmp_path / "flow.html"))
    areas = "[...document.querySelectorAll('.bubble, .level')].map(x => new DOMMatrix(getComputedStyle(x).transform))"
    tail = moving.places.index("tail")
    with opened(page, 390, 800) as shown:
        slider = shown.locator("input[type=range]")
        for k in (0, 3, 8):
            slider.fill(str(k))
            drawn = shown.evaluate(f"{areas}.map(m => [m.a, m.d])")
            bubbles = sorted(a * a for a, d in drawn if abs(a - d) < 1e-9)
            assert bubbles[-1] == pytest.approx(moving.mass[k, : len(bubbles)].max(), abs=3e-3)
            levels = [d for a, d in drawn if a == 1 and d != 1]
            assert max(levels) == pytest.approx(moving.mass[k, list(moving.ends.values())].max(), abs=3e-3)
        assert shown.locator(".pause").is_checked()
        assert shown.complaints == []
    assert moving.mass[3, tail] > 0.3
    with opened(page, reduced_motion="reduce") as shown:
        states = shown.evaluate("document.querySelector('figure').getAnimations({subtree: true}).map(a => a.playState)")
        assert set(states) == {"paused"}
        harm = shown.evaluate(f"{areas}.map(m => m.d)")
        assert any(abs(h - moving.mass[8, moving.ends["harm"]]) < 3e-3 for h in harm)
