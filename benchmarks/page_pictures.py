"""Pictures of the page of `intra serve`, for the documents: wide, dark, on a phone, with a setup alarm and an error.

    python benchmarks/page_pictures.py RUN DATA --out docs/images [--defect broken_large]

RUN is a trained run, DATA its category. Needs Chromium.
"""

import argparse
import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
from playwright.sync_api import sync_playwright

from intra.data.folder import find_category

NUM_GOOD, NUM_DEFECTIVE = 2, 5
WIDE, PHONE = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}


def content(path: Path, brightness: float = 1.0) -> dict[str, Any]:
    """A photo as a file that is chosen on the page."""
    photo = PIL.Image.open(path).convert("RGB").point(lambda value: round(value * brightness))
    file = io.BytesIO()
    photo.save(file, format="PNG")
    name = f"{path.parent.name}_{path.stem}{'' if brightness == 1 else '_dark'}.png"
    return {"name": name, "mimeType": "image/png", "buffer": file.getvalue()}


def take(browser: Any, address: str, files: list[dict[str, Any]], target: Path, **context: Any) -> None:
    """A picture of the page with the verdicts on these photos, the last one shown."""
    page = browser.new_context(**context).new_page()
    page.goto(address)
    page.wait_for_selector("body.ready")
    for file in files:  # one after the other: the page shows the last
        page.set_input_files("#photos", [file])
        page.wait_for_selector("#progress[hidden]", state="attached")
    page.wait_for_timeout(500)
    page.screenshot(path=target)
    page.context.close()
    PIL.Image.open(target).convert("P", palette=PIL.Image.Palette.ADAPTIVE, colors=256).save(target, optimize=True)
    print(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--defect", help="of which the photo shown is; without it, of the first")
    given = parser.parse_args()
    tests = find_category(given.data).test
    good = [test.path for test in tests if not test.label]
    bad = [test.path for test in tests if test.label]
    shown = next(path for path in bad if given.defect in (None, path.parent.name))
    batch = [content(path) for path in (*good[:NUM_GOOD], *bad[:: max(1, len(bad) // NUM_DEFECTIVE)], shown)]
    command = [sys.executable, "-m", "intra.cli", "serve", str(given.run), "--port", "0"]
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        found = re.match(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        assert found, "the server did not start"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        take(browser, found[0], batch, given.out / "serve_wide.png", viewport=WIDE)
        take(browser, found[0], batch, given.out / "serve_dark.png", viewport=WIDE, color_scheme="dark")
        take(browser, found[0], batch, given.out / "serve_phone.png", viewport=PHONE)
        take(browser, found[0], [content(good[0]), content(good[1], 0.6)], given.out / "serve_setup.png", viewport=WIDE)
        broken = {"name": "scan.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"}
        take(browser, found[0], [content(good[0]), broken], given.out / "serve_error.png", viewport=WIDE)
        browser.close()
        server.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
