"""The report in a real browser: what a model said stays text, nothing is fetched, nothing is complained about."""

from __future__ import annotations

import re

import pytest
from browser import opened
from report_pages import SHALLOW, rollouts

from markovsafety import JudgedPrefix, KGram, report
from markovsafety.analysis import analyse

HOSTILE = (
    "<script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 'taken'\">",
    '"><svg onload="document.title=\'taken\'">',
    "<iframe srcdoc=\"<script>parent.document.title='taken'</script>\"></iframe>",
    "</style></title><script>alert(1)</script>",
    "{{ 7 * 7 }}<a href=\"javascript:document.title='taken'\">x</a>",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report of rollouts that say hostile things wherever a model's words, names or categories can stand."""
    place = tmp_path_factory.mktemp("report")
    rolls = rollouts(SHALLOW, categories=HOSTILE[:2], prompts=4)
    told = {"model": HOSTILE[0], "engine": HOSTILE[1], "judge": {"name": HOSTILE[2]}}
    models = [
        analyse(HOSTILE[4], rolls.replace(provenance=told), states=KGram(1), words=lambda i: HOSTILE[i % len(HOSTILE)]),
        analyse("judged", rolls, states=JudgedPrefix({3: HOSTILE[3], 4: HOSTILE[5]})),
    ]
    report.write(place, models, title=HOSTILE[4], command=HOSTILE[5], extra={HOSTILE[0]: HOSTILE[1]})
    return place


def test_what_a_model_said_is_inert(folder):
    with opened(folder / "index.html") as page:
        assert page.title() != "taken"
        assert (
            page.evaluate("document.querySelectorAll('iframe, svg[onload], img[onerror], a[href^=javascript]').length")
            == 0
        )
        assert HOSTILE[0] in page.inner_text("body")
        assert page.complaints == []


def test_the_policy_stops_what_escaping_would_let_through(folder, tmp_path):
    """The same page with one of the texts put in as it is: the policy runs the page's own script, and no other."""
    source = (folder / "index.html").read_text(encoding="utf-8")
    policy = re.search(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", source)[0]
    path = tmp_path / "index.html"
    path.write_text(source, encoding="utf-8")
    with opened(path) as page:
        for said in HOSTILE[:4]:
            raw = source.replace("</main>", f'<p title="{said}</p></main>' if said[0] == '"' else f"{said}</main>", 1)
            for text, taken in ((raw, False), (raw.replace(policy, "", 1), True)):
                path.write_text(text, encoding="utf-8")
                page.reload()
                assert (page.title() == "taken") == taken, said
                assert page.is_visible("#controls")  # our own script has run
