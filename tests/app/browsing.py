"""The app in a real browser: what a visitor does there, and what is on show."""

import re
import shutil
from urllib.request import urlopen

from PIL import Image
from running_app import pixels

from vlv_app.settings import SETTINGS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LABELS = {name: setting.label for name, setting in SETTINGS.items()} | {"num_queries": "Queries"}
PATIENCE = 180_000  # milliseconds
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# What the page keeps of a field, by its tab and its name.
KEPT = """([tab, name]) => {
    const key = Object.keys(sessionStorage).find((key) => key.startsWith("vlv.fields.") && key.endsWith(`.${tab}`));
    return JSON.parse(sessionStorage.getItem(key) ?? "{}")[name];
}"""


def new_page(browser, **settings):
    """A page that waits as long as a busy machine needs."""
    page = browser.new_page(**settings)
    page.set_default_timeout(PATIENCE)
    return page


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()
    tab = page.locator("[role=tabpanel]:visible")
    tab.locator("button.run").first.wait_for()
    return tab


def picture(page, key="image"):
    """A picture input: `image`, which all tabs share, or `second`."""
    return page.locator(f"#picture-{key}")


def choose_file(page, file, key="image"):
    """Upload a file, and wait until the page shows the picture."""
    picture(page, key).locator("input[type=file]").set_input_files(file)
    picture(page, key).locator(".drop img").wait_for()


def press(page, name):
    """Press a button of the tab. What an earlier run has left is then no sign that this one is done."""
    page.evaluate("document.querySelectorAll('[data-done]').forEach(each => each.removeAttribute('data-done'))")
    page.locator("[role=tabpanel]:visible").get_by_role("button", name=name, exact=True).click()


def set_number(tab, label, value):
    """A setting, of those that are folded away."""
    field = tab.get_by_role("spinbutton", name=re.compile(label))
    if not field.is_visible():
        tab.get_by_role("button", name="Settings").click()
    (name,) = (name for name, known in LABELS.items() if re.search(label, known))
    place = [tab.page.locator("[role=tab][aria-selected=true]").inner_text().strip(), name]
    # A field that has just been unfolded may not listen yet: it is filled until the page has taken the number.
    while tab.page.evaluate(KEPT, place) != value:
        field.fill(str(value))
        field.press("Tab")
        tab.page.wait_for_timeout(100)


def status(page):
    return page.locator(".status:visible").first


def wait_until_done(page, words="Done"):
    status(page).locator("[data-done]").get_by_text(words).wait_for()


def pixels_of(image):
    """The pixels of an `<img>`."""
    with urlopen(image.evaluate("image => image.src")) as response:
        return pixels(Image.open(response))
