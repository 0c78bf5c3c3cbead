"""Makes the pictures of pages in docs/static: ``python docs/screenshots.py [site] [--report report.html]``.

Headless Chromium shows the built documentation (built here if no folder of it is given) and a report; a contact sheet
is made of all figures of the gallery. Pictures are WebP below 200 kB. It needs playwright and a Chromium of the system
(or CHROMIUM=path), and fetches nothing.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATIC = ROOT / "docs" / "static"
LARGEST = 200_000  # bytes of a picture
SHEET = """<!doctype html><meta charset="utf-8"><title>All figures</title>
<style>body {{ margin: 12px; background: {paper}; columns: 4; column-gap: 12px }}
img {{ width: 100%; margin-bottom: 12px; break-inside: avoid }}</style>{images}"""


@dataclass(frozen=True)
class Shot:
    """A picture of a page."""

    name: str  # of the file in docs/static, without its ending
    page: Path
    width: int = 1200
    height: int = 800
    dark: bool = False
    whole: bool = False  # the whole page, not only what the window shows
    at: str = ""  # scrolled to what this selector finds
    scale: float = 1.0  # of the picture


def shoot(shots: Sequence[Shot], folder: Path = STATIC) -> list[Path]:
    """Take the pictures."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("CHROMIUM") or next((p for n in names if (p := shutil.which(n))), None)
    made = []
    with sync_playwright() as play:
        # In a container Chromium runs as root, where its own sandbox does not work.
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        for shot in shots:
            size, scheme = {"width": shot.width, "height": shot.height}, "dark" if shot.dark else "light"
            how = {"viewport": size, "color_scheme": scheme, "offline": True, "reduced_motion": "reduce"}
            context = browser.new_context(device_scale_factor=2 if shot.width < 500 else 1, **how)
            page = context.new_page()
            page.goto(shot.page.resolve().as_uri())
            page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
            page.evaluate("Promise.all([...document.images].map(i => i.decode().catch(() => 0)))")
            if shot.at:
                page.locator(shot.at).first.scroll_into_view_if_needed()
            made.append(compressed(page.screenshot(full_page=shot.whole), folder / f"{shot.name}.webp", shot.scale))
            context.close()
        browser.close()
    return made


def compressed(picture: bytes, path: Path, scale: float = 1.0) -> Path:
    """Write a picture as WebP, in the best quality that is small enough."""
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    for quality in (90, 80, 70, 60, 45, 30):
        out = io.BytesIO()
        image.save(out, "webp", quality=quality, method=6)
        if len(out.getvalue()) < LARGEST:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())
    return path


def built(folder: Path) -> Path:
    """The documentation without outputs of notebooks."""
    env = {**os.environ, "MARKOVSAFETY_DOCS_NOTEBOOKS": "off"}
    words = [sys.executable, "-m", "sphinx", "-q", str(ROOT / "docs"), str(folder)]
    subprocess.run(words, check=True, cwd=ROOT, env=env)
    return folder


def sheet(site: Path, folder: Path, dark: bool) -> Path:
    """A page with all figures of the gallery."""
    ending = "-dark.svg" if dark else ".svg"
    found = [p for p in sorted((site / "_static" / "gallery").glob("*.svg")) if p.stem.endswith("-dark") == dark]
    found = [p for p in found if "-column" not in p.stem]
    images = "".join(f'<img src="{p.resolve().as_uri()}" alt="{p.name.removesuffix(ending)}">' for p in found)
    page = folder / f"sheet{ending}.html"
    page.write_text(SHEET.format(paper="#131416" if dark else "white", images=images), encoding="utf-8")
    return page


def site_shots(site: Path, folder: Path) -> list[Shot]:
    return [
        Shot("gallery-light", sheet(site, folder, False), 1600, 900, whole=True, scale=0.75),
        Shot("gallery-dark", sheet(site, folder, True), 1600, 900, dark=True, whole=True, scale=0.75),
        Shot("docs-light", site / "index.html"),
        Shot("docs-dark", site / "gallery.html", dark=True, at="#plot-chain"),
        Shot("docs-phone", site / "gallery.html", 390, 844, at="#plot-depth"),
    ]


def report_shots(report: Path) -> list[Shot]:
    return [
        Shot("report-light", report, 1200, 1500),
        Shot("report-dark", report, 1200, 1300, dark=True, at="#map-0"),
        Shot("report-phone", report, 390, 1400),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", nargs="?", type=Path, help="folder of the built documentation")
    parser.add_argument("--report", type=Path, help="a report: only its pictures are made, unless a site is given too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shots = report_shots(options.report) if options.report else []
        if options.site or not options.report:
            shots += site_shots(options.site or built(Path(folder) / "site"), Path(folder))
        for path in shoot(shots):
            print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
