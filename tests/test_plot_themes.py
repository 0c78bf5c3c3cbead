"""Themes and sizes: colours that anybody can tell apart, text that can be read where it stands, files that last."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text
from test_plot import bound, ladder, some_profile
from test_plot_columns import DRAW

from markovsafety import InputError, plot
from markovsafety.plot.style import readable
from markovsafety.plot.themes import LOOKS, SIZES

EYES = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Linear RGB as an eye without one kind of cones sees it: G. M. Machado, M. M. Oliveira and L. A. F. Fernandes,
A Physiologically-based Model for Simulation of Color Vision Deficiency, IEEE TVCG 15 (2009) 1291, severity 1."""
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])
WHITE = XYZ @ np.ones(3)


def linear(colour: Any) -> np.ndarray:
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB, white point D65."""
    x = XYZ @ np.clip(rgb, 0, 1) / WHITE
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def nearest(colours: Any, eye: str) -> float:
    """Least distance in CIELAB (CIE 1976) between two of the colours; 2.3 can just be noticed."""
    seen = [lab(np.array(EYES[eye]) @ linear(c)) for c in colours]
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2))


def contrast(a: Any, b: Any) -> float:
    """Of WCAG 2.2."""
    low, high = sorted(0.05 + float(np.array([0.2126, 0.7152, 0.0722]) @ linear(c)) for c in (a, b))
    return high / low


def test_distances_are_those_of_cielab():
    assert lab(linear("#FFFFFF")) == pytest.approx([100, 0, 0], abs=1e-6)
    assert lab(linear("#FF0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.02)
    assert contrast("#FFFFFF", "#000000") == pytest.approx(21)
    # Red and green of one lightness, which eyes without the second kind of cones take for each other.
    assert nearest(["#C05000", "#6F7A00"], "deuteranopia") < 12 < 50 < nearest(["#C05000", "#6F7A00"], "all cones")


@pytest.mark.parametrize("eye", EYES)
def test_any_two_colours_can_be_told_apart_by_any_eye(eye):
    assert nearest(plot.OUTCOME_COLOURS.values(), eye) > 11
    for look in LOOKS.values():
        assert nearest(look.models, eye) > 18, look.name


def test_colours_stand_out_from_the_background_and_text_can_be_read():
    for look in LOOKS.values():
        assert all(contrast(c, look.paper) > 2.3 for c in look.models), look.name  # they are never alone: with markers
        assert all(contrast(c, look.paper) > 2.8 for c in plot.OUTCOME_COLOURS.values()), look.name
        assert all(contrast(c, look.paper) > 4.5 for c in (look.ink, look.soft)), look.name
        for ramp in (look.harm_ramp, look.budget_ramp, look.head_ramp):
            assert all(contrast(readable(c), c) > 4.5 for c in ramp), look.name


def lettering(ax: Any) -> list[Text]:
    return [t for t in ax.figure.findobj(Text) if t.get_text().strip() and t.get_visible()]


@pytest.mark.parametrize("name", sorted(DRAW))
def test_no_text_is_smaller_than_six_points_in_a_column_of_a_paper(name):
    with plot.theme("print", size="column"):
        ax = DRAW[name](None)
    ax.figure.draw_without_rendering()
    assert ax.figure.get_figwidth() == 3.35
    assert min(t.get_fontsize() for t in lettering(ax)) >= 6


@pytest.mark.parametrize("name", sorted(DRAW))
def test_every_figure_has_a_dark_variant(name):
    look = LOOKS["dark"]
    with plot.theme("dark"):
        ax = DRAW[name](None)
    ax.figure.draw_without_rendering()
    assert to_hex(ax.figure.get_facecolor()) == to_hex(ax.get_facecolor()) == look.paper
    outside = [ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()]
    outside += ax.get_legend().get_texts() if ax.get_legend() else []
    assert all(contrast(t.get_color(), look.paper) > 4.5 for t in outside)
    light = {to_hex(c) for c in (LOOKS["light"].ink, LOOKS["light"].soft)}
    assert not [t for t in lettering(ax) if to_hex(t.get_color()) in light]


@pytest.mark.parametrize("theme", LOOKS)
def test_outcomes_keep_their_colours(theme):
    shares = {0: {name: bound(0.25) for name in plot.OUTCOME_COLOURS}}
    with plot.theme(theme):
        ax = plot.outcomes(shares)
    bars = {c.get_label(): c.patches[0] for c in ax.containers if hasattr(c, "patches")}
    assert {n: to_hex(b.get_facecolor()).upper() for n, b in bars.items()} == plot.OUTCOME_COLOURS
    hatched = {n for n, b in bars.items() if b.get_hatch()}
    assert hatched == ({"harm", "benign", "truncated"} if theme == "print" else set())


def test_a_figure_keeps_its_look_and_the_theme_ends():
    with plot.theme("dark", size="slide"):
        fig, ax = plot.figure()
        assert fig.get_size_inches().tolist() == [8.0, 4.5]
    assert fig.get_facecolor()[:3] == to_rgb(LOOKS["dark"].paper)
    plot.depth({"a": some_profile(0.1, 0.2)}, ax=ax)
    assert ax.xaxis.label.get_color() == LOOKS["dark"].ink
    assert ax.xaxis.label.get_fontsize() == 12
    assert plot.chain(ladder()).figure.get_facecolor() == (1, 1, 1, 1)
    with pytest.raises(RuntimeError), plot.theme("dark"):
        raise RuntimeError
    assert plot.figure()[0].get_facecolor() == (1, 1, 1, 1)


def test_sizes_are_those_of_their_places():
    for size, (width, height, _) in SIZES.items():
        assert plot.figure(size)[0].get_size_inches().tolist() == [width, height]
        wide, tall = replace(LOOKS["light"], size=size).fitted(8.0, 4.2)
        assert wide == width
        assert 0.5 * height < tall <= 1.1 * height
    for wrong in ({"name": "sepia"}, {"size": "poster"}):
        with pytest.raises(InputError, match="There is no"), plot.theme(**wrong):
            pass
    with pytest.raises(InputError, match="There is no size"):
        plot.figure("poster")


def test_pdf_has_its_letters_and_vector_files_are_the_same_twice(tmp_path):
    for name in ("depth", "width", "plane"):
        for kind in ("pdf", "svg"):
            paths = [plot.save(DRAW[name](None), tmp_path / f"{name}{i}.{kind}") for i in range(2)]
            first, second = (open_bytes(p) for p in paths)
            assert first == second
            if kind == "pdf":
                assert re.search(rb"/FontFile2", first)
                assert not re.search(rb"/Subtype /Type3", first)


def open_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
