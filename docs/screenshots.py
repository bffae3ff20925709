"""
Takes the pictures of the app in docs/ again, on a desktop, a phone and in the dark theme.

    python docs/screenshots.py [--model M]

It needs Chromium.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Browser, Page, sync_playwright

from vlv.scenes import world, write_scenes

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PORT = "7869"
URL = f"http://127.0.0.1:{PORT}"
DESKTOP = {"viewport": {"width": 1200, "height": 900}, "device_scale_factor": 1.5}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}
TIMEOUT = 600_000  # milliseconds: a large model on a CPU is slow


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"GRADIO_SERVER_PORT": PORT, "GRADIO_ANALYTICS_ENABLED": "False", "XDG_DATA_HOME": scratch}
        app = subprocess.Popen(
            [sys.executable, ROOT / "spaces_app.py", *arguments], env={**os.environ, **settings}, cwd=ROOT
        )
        try:
            wait_for(app)
            with sync_playwright() as driver:
                flags = ["--no-sandbox", "--disable-gpu"]
                browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
                take_all(browser, write_scenes(Path(scratch) / "scenes", 24, split="test", world=world("emoji")))
                browser.close()
        finally:
            app.terminate()
            app.wait()


def wait_for(app: subprocess.Popen) -> None:
    while app.poll() is None:
        try:
            urlopen(URL).close()
            return
        except URLError:
            time.sleep(0.5)
    sys.exit("The app did not start.")


def take_all(browser: Browser, folder: Path) -> None:
    page = open_page(browser, **DESKTOP)
    for tab in ("Caption", "Reconstruct", "Compose"):
        run(page, tab)
        picture(page, f"app-{tab.lower()}", full_page=tab == "Compose")  # the strip is below
    collection(page, folder)
    picture(page, "app-collection")
    page.close()
    page = open_page(browser, **DESKTOP, color_scheme="dark")
    run(page, "Reconstruct")
    picture(page, "app-dark")
    page.close()
    page = open_page(browser, **PHONE)
    run(page, "Reconstruct")
    page.screenshot(path=DOCS / "app-phone.png")  # as it is after pressing: the result is in view
    page.close()


def open_page(browser: Browser, **settings) -> Page:
    page = browser.new_page(**settings)
    page.set_default_timeout(TIMEOUT)
    page.goto(URL)
    page.get_by_role("tab", name="Caption").wait_for()
    return page


def run(page: Page, tab: str) -> None:
    """A tab with an example, and what the model makes of it."""
    page.get_by_role("tab", name=tab).click()
    panel = page.locator("[role=tabpanel]:visible")
    page.locator("#picture-image").get_by_role("button", name="Example 4").click()
    page.locator("#picture-image .drop img").wait_for()
    button = tab
    if tab == "Compose":
        panel.get_by_role("button", name="Example 1").click()
        page.locator("#picture-second .drop img").wait_for()
        panel.get_by_label("interpolate").check()
        button = "Compose several shares"
    panel.get_by_role("button", name=button, exact=True).click()
    panel.locator(".status [data-done]").first.wait_for()
    page.wait_for_timeout(500)  # until the last picture is drawn


def collection(page: Page, folder: Path) -> None:
    page.get_by_role("tab", name="Collection").click()
    page.locator("#c-path").fill(str(folder))
    page.get_by_role("button", name="Open", exact=True).click()
    page.locator("#c-rows li").first.wait_for()
    page.wait_for_function("[...document.querySelectorAll('#c-rows img')].every(image => image.naturalWidth)")
    # The folder is a temporary one, and its name says nothing. Nothing may write it again.
    page.evaluate("for (let timer = 0; timer < 10_000; timer++) clearInterval(timer)")
    page.locator("#c-path").fill("~/pictures/scenes")
    page.evaluate(
        "document.querySelector('#c-about').textContent = '~/pictures/scenes: 24 images, 24 with a caption.'"
    )


def picture(page: Page, name: str, full_page: bool = False) -> None:
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(300)
    page.screenshot(path=DOCS / f"{name}.png", full_page=full_page)


if __name__ == "__main__":
    main(sys.argv[1:])
