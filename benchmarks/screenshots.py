"""Renew the pictures of the demo's report in docs/, with a headless Chromium (Debian: chromium chromium-driver).

    python benchmarks/screenshots.py                                    # results/demo/report -> docs (make screenshots)
    python benchmarks/screenshots.py --report DIR/index.html --output_dir OUT

report.png is the top of the page, report-speed.png its speed tables.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

WIDTH, HEIGHT = 1440, 1200


def write_png(data: bytes, path: Path) -> None:
    """A page has few colours: a palette takes a third of the bytes."""
    Image.open(io.BytesIO(data)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("results/demo/report/index.html"), help="page of a report")
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="where the pictures go")
    chosen = parser.parse_args()
    if not chosen.report.is_file():
        parser.error(f"--report {chosen.report}: no such file; run `make demo` first")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as profile:
        for flag in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            driver.set_window_size(WIDTH, HEIGHT)
            driver.get(chosen.report.resolve().as_uri())
            write_png(driver.get_screenshot_as_png(), chosen.output_dir / "report.png")
            # A picture of an element that is larger than the window would be cut.
            driver.set_window_size(WIDTH, driver.find_element(By.ID, "speed").size["height"] + 200)
            write_png(driver.find_element(By.ID, "speed").screenshot_as_png, chosen.output_dir / "report-speed.png")
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
