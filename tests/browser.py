"""Headless Chromium for tests of pages: the one of the system, for nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str:
    """Path of a Chromium; without one the test does not run here and says so, and fails where all must run."""
    found = os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        said = "not here: there is no Chromium (apt-get install chromium, or CHROMIUM=path)"
        pytest.fail(said) if os.environ.get("RUN_EVERYTHING") else pytest.skip(said)
    return found


def barriers(page: Any, **options: Any) -> list[str]:
    """What axe-core finds wrong for people who read by screen reader, by keyboard or with weak eyes, however slight.

    Parameters
    ----------
    page : Page
        Of playwright; what is folded up is not looked at.
    **options
        For `axe.run`.
    """
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate(Axe().axe_script)
    found = page.evaluate(
        "options => axe.run(document, options)", {"resultTypes": ["violations"], "preload": False, **options}
    )
    return [f"{v['id']} ({v['impact']}): {n['html'][:200]}" for v in found["violations"] for n in v["nodes"]]


@contextmanager
def opened(page: Path, width: int = 1200, height: int = 900, **options: Any) -> Iterator[Any]:
    """A file shown in a browser without network; ``page.complaints`` lists console errors and requests to elsewhere."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        # In a container Chromium runs as root, where its own sandbox does not work.
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        try:
            context = browser.new_context(viewport={"width": width, "height": height}, offline=True, **options)
            shown = context.new_page()
            told: list[str] = []
            shown.on("console", lambda m: told.append(m.text) if m.type in ("error", "warning") else None)
            shown.on("pageerror", lambda error: told.append(str(error)))
            shown.on("dialog", lambda d: (told.append(f"dialog: {d.message}"), d.dismiss()))
            shown.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else told.append(r.url))
            shown.complaints = told
            shown.goto(page.resolve().as_uri())
            yield shown
        finally:
            browser.close()
