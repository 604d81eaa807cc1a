"""Ask the page of `app.py` something in a real browser, and take its picture.

    python examples/rag_server/screenshot.py "How do bees tell where flowers are?" --output docs/images/rag.png

Needs Debian's packages chromium and chromium-driver, and `pip install selenium`.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=900,900"),
]
IS_ANSWERED = "return document.querySelector('#timings').textContent || document.querySelector('#error').textContent"
SIZE = "return [window.innerWidth, document.documentElement.scrollHeight]"


@contextmanager
def browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """Chromium without a window, with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def picture(driver: webdriver.Chrome, scale: float) -> bytes:
    """PNG of the whole page."""
    width, height = driver.execute_script(SIZE)
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": scale}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return base64.b64decode(shot["data"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the page (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("rag.png"))
    parser.add_argument("--width", type=int, default=840, help="of the window (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.25, help="pixels of the picture per pixel of the page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, browser(Path(profile)) as driver:
        driver.set_window_size(args.width, 600)
        driver.get(args.url)
        driver.find_element("id", "question").send_keys(args.question)
        driver.find_element("id", "go").click()
        WebDriverWait(driver, 300).until(lambda found: found.execute_script(IS_ANSWERED))
        driver.execute_script("document.activeElement.blur()")
        args.output.write_bytes(picture(driver, args.scale))
    print(args.output)


if __name__ == "__main__":
    main()
