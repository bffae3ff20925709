"""Retakes the pictures of the app in docs/: `python docs/screenshots.py [--model M]`. Needs Chromium."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PORT = "7869"
URL = f"http://127.0.0.1:{PORT}"


def main(arguments: list[str]) -> None:
    environment = {**os.environ, "GRADIO_SERVER_PORT": PORT, "GRADIO_ANALYTICS_ENABLED": "False"}
    app = subprocess.Popen([sys.executable, ROOT / "spaces_app.py", *arguments], env=environment)
    try:
        wait_for(app)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1120, "height": 820}, device_scale_factor=1.5)
            page.set_default_timeout(600_000)
            page.goto(URL)
            for tab in ("Caption", "Reconstruct", "Compose"):
                take(page, tab)
            browser.close()
    finally:
        app.terminate()


def wait_for(app: subprocess.Popen) -> None:
    while app.poll() is None:
        try:
            urlopen(URL).close()
            return
        except URLError:
            time.sleep(0.5)
    sys.exit("The app did not start.")


def take(page: Page, tab: str) -> None:
    """The first example of a tab, with what the model makes of it."""
    page.get_by_role("tab", name=tab).click()
    panel = page.locator("[role=tabpanel]:visible")
    panel.locator(".gallery-item, tbody tr").first.click()
    panel.locator(".picture img").first.wait_for()
    page.wait_for_load_state("networkidle")
    panel.get_by_role("button", name=tab, exact=True).click()
    if tab == "Compose":
        panel.locator(".picture img").nth(2).wait_for(timeout=600_000)
    else:
        page.wait_for_function("[...document.querySelectorAll('textarea')].some(a => a.offsetParent && a.value)")
    page.wait_for_timeout(3000)  # until the last word has come and the progress bar has gone
    page.mouse.move(0, 0)
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=DOCS / f"app-{tab.lower()}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
