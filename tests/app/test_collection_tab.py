"""The Collection tab in a browser, on a folder of this computer and on uploads."""

import json
import shutil
import zipfile
from urllib.parse import urlsplit

import pytest
import tiny
from browsing import PATIENCE, new_page
from running_app import NEW_TOKENS, App
from test_accessibility import violations

from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.models.loading import load_captioner


@pytest.fixture
def window(browser, app):
    context = browser.new_context(viewport={"width": 1200, "height": 1000}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{app.url}/?tab=Collection")
    page.locator("#c-path").wait_for()
    yield page
    context.close()
    assert {host for host in hosts if host} == {urlsplit(app.url).netloc}
    assert not errors


@pytest.fixture
def folder(tmp_path, pictures):
    """23 images, more than a page, of which one has a caption and one cannot be read."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(23):
        shutil.copyfile(pictures[number % 8], folder / f"{number:02}.png")
    (folder / "03.txt").write_text("a caption by hand\n")
    (folder / "05.png").write_text("This is no picture.")
    return folder


@pytest.fixture(scope="module")
def expected(repo, pictures):
    """What `vlv caption` writes for the eight pictures."""
    captioner = Captioner(*load_captioner(str(repo)), Decoding(max_new_tokens=NEW_TOKENS))
    from PIL import Image

    images = ((file.name, Image.open(file)) for file in pictures)
    return [captions[0].text for _, captions in captioner.caption_images(images)]


def open_folder(page, folder):
    page.locator("#c-path").fill(str(folder))
    page.get_by_role("button", name="Open", exact=True).click()
    page.locator("#c-rows li").first.wait_for()


def caption_all(page):
    page.get_by_label("Longest caption").last.fill(str(NEW_TOKENS))
    page.get_by_role("button", name="Caption all").click()
    page.locator("#c-run").get_by_text("Done: ").wait_for()


def boxes(page):
    return [box.input_value() for box in page.locator("#c-rows textarea").all()]


def wait_for_box(page, place, text):
    page.wait_for_function(
        "([place, text]) => document.querySelectorAll('#c-rows textarea')[place]?.value === text", arg=[place, text]
    )


def test_a_folder_from_captions_to_text_files(window, folder, expected):
    open_folder(window, folder)
    assert window.locator("#c-rows li").count() == 20
    assert boxes(window)[3] == "a caption by hand"
    caption_all(window)
    window.get_by_text("Done: 21 captioned, 1 could not be read.").wait_for()
    wait_for_box(window, 19, expected[19 % 8])
    # The captions of `vlv caption`; what was captioned is skipped.
    shown = [expected[number % 8] for number in range(20)]
    shown[3], shown[5] = "a caption by hand", ""
    assert boxes(window) == shown
    assert "05.png: " in window.locator("#c-rows li").nth(5).inner_text()
    window.wait_for_function("[...document.querySelectorAll('#c-rows img')].filter(i => i.naturalWidth).length == 19")

    # Keyboard: to the next caption, over the end of the page, and skipping an image.
    window.locator("#c-rows textarea").nth(18).focus()
    window.keyboard.press("Alt+ArrowDown")
    window.keyboard.press("Alt+k")
    window.get_by_text("1 skipped").wait_for()
    window.keyboard.press("Alt+ArrowDown")
    window.get_by_text("Page 2 of 2").wait_for()
    window.wait_for_function("document.activeElement === document.querySelector('#c-rows textarea')")
    window.keyboard.type("edited: ")
    window.locator("#c-rows li").first.get_by_text("Kept.").wait_for()

    # All captions that are found.
    window.get_by_label("Search").fill("by hand")
    window.get_by_text("Page 1 of 1, 1 images").wait_for()
    window.get_by_text("Change all captions that are found").click()
    window.get_by_label("Find", exact=True).fill("hand")
    window.get_by_label("Replace by").fill("foot")
    window.get_by_role("button", name="Replace", exact=True).click()
    window.get_by_text("1 caption is changed.").wait_for()
    window.get_by_label("Search").fill("")
    window.get_by_text("Page 1 of 2").wait_for()
    window.get_by_label("Trigger words").fill("ohwx")
    window.get_by_role("button", name="Add", exact=True).click()
    window.get_by_text("22 captions are changed.").wait_for()
    wait_for_box(window, 3, "ohwx, a caption by foot")

    window.get_by_role("button", name="Save .txt files beside the images").click()
    window.get_by_text("21 captions are saved.").wait_for()
    texts = {file.stem: " ".join(file.read_text().split()) for file in folder.glob("*.txt")}
    assert len(texts) == 21 and "19" not in texts and "05" not in texts
    assert texts["03"] == "ohwx, a caption by foot"
    assert texts["00"] == " ".join(f"ohwx, {expected[0]}".split())
    assert "edited:" in texts["20"]
    window.get_by_role("button", name="Save metadata.jsonl").click()
    window.get_by_text("They are in").wait_for()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert {row["file_name"] for row in rows} == {f"{stem}.png" for stem in texts}


@pytest.mark.slow
def test_nothing_is_lost_on_reload_or_in_a_second_window(window, folder):
    open_folder(window, folder)
    window.locator("#c-rows textarea").first.fill("kept by the server")
    window.locator("#c-rows li").first.get_by_text("Kept.").wait_for()
    window.reload()
    wait_for_box(window, 0, "kept by the server")
    second = window.context.new_page()
    second.set_default_timeout(PATIENCE)
    second.goto(window.url)
    wait_for_box(second, 0, "kept by the server")
    # Both change the same caption. The one who comes later is told, and loses nothing.
    second.locator("#c-rows textarea").first.evaluate("area => { area.value = 'second'; }")
    window.locator("#c-rows textarea").first.fill("first")
    window.locator("#c-rows li").first.get_by_text("Kept.").wait_for()
    second.locator("#c-rows textarea").first.dispatch_event("blur")
    second.get_by_text("Another window has changed this caption to: “first”.").wait_for()
    assert boxes(second)[0] == "second"
    second.locator("#c-rows textarea").first.fill("second, once more")
    second.locator("#c-rows li").first.get_by_text("Kept.").wait_for()
    window.evaluate("dispatchEvent(new Event('focus'))")
    wait_for_box(window, 0, "second, once more")


@pytest.mark.slow
def test_a_zip_is_captioned_and_downloaded(window, app, pictures, tmp_path, expected):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in pictures[:3]:
            archive.write(file, f"set/{file.name}")
    window.locator("#c-files").set_input_files([tmp_path / "set.zip", pictures[4]])
    window.locator("#c-rows li").nth(3).wait_for()
    assert window.get_by_role("button", name="Save .txt files").count() == 0
    caption_all(window)
    with window.expect_download() as download:
        window.get_by_role("button", name="Download a zip").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        names = ["picture-4.png", *(f"set/{file.name}" for file in pictures[:3])]
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
        assert {row["file_name"]: row["text"] for row in rows} == dict(
            zip(names, [expected[4], *expected[:3]], strict=True)
        )
        assert archive.read(names[0]) == pictures[4].read_bytes()
    window.on("dialog", lambda dialog: dialog.accept())
    before = list(app.data.glob("vlv/collections/*/images"))
    window.get_by_role("button", name="Delete the collection").click()
    window.get_by_text("The collection is deleted.").wait_for()
    assert len(list(app.data.glob("vlv/collections/*/images"))) == len(before) - 1


@pytest.mark.slow
def test_a_run_is_stopped_and_resumed(window, tmp_path, pictures):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(120):
        shutil.copyfile(pictures[number % 8], folder / f"{number:03}.png")
    open_folder(window, folder)
    window.get_by_label("Longest caption").last.fill("200")
    window.get_by_role("button", name="Caption all").click()
    window.get_by_text("Captioning: ").wait_for()
    window.wait_for_function(
        "/with a caption/.test(document.querySelector('#c-about').textContent)"
        " && !/ 0 with a caption/.test(document.querySelector('#c-about').textContent)"
    )
    window.locator("#c-stop").click()
    window.get_by_text("Press Caption all to resume.").wait_for()
    window.get_by_label("Show").select_option("without caption")
    window.get_by_text(" images").first.wait_for()
    window.get_by_label("Longest caption").last.fill("8")
    window.get_by_role("button", name="Caption all").click()
    window.locator("#c-run").get_by_text("Done: ").wait_for()
    window.get_by_text("120 images, 120 with a caption.").wait_for()


@pytest.mark.slow
def test_worst_scores_come_first_where_there_are_scores(window, folder):
    rows = [
        {"file_name": f"{number:02}.png", "text": f"caption {number}", "score": number / 10, "explained": -number}
        for number in (2, 0, 1)
    ]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    open_folder(window, folder / "scored.jsonl")
    assert boxes(window) == ["caption 2", "caption 0", "caption 1"]
    window.get_by_label("Order").select_option("worst score first")
    wait_for_box(window, 0, "caption 0")
    assert boxes(window) == ["caption 0", "caption 1", "caption 2"]
    assert "Score 0.100. Explained -1.000." in window.locator("#c-rows li").nth(1).inner_text()
    window.get_by_label("Order").select_option("worst explained first")
    wait_for_box(window, 0, "caption 2")
    assert window.locator("#c-order option", has_text="worst likelihood first").is_hidden()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_tab_is_accessible(window, app, folder, theme):
    window.goto(f"{app.url}/?tab=Collection&__theme={theme}")
    open_folder(window, folder)
    window.get_by_text("Change all captions that are found").click()
    window.wait_for_function("[...document.querySelectorAll('#c-rows img')].some(image => image.naturalWidth)")
    assert violations(window) == []


@pytest.mark.parametrize(
    "path, sentence", [("", "Name a folder"), ("/nowhere/at/all", "There is no folder and no file")]
)
def test_a_wrong_path_gets_one_sentence(window, path, sentence):
    window.locator("#c-path").fill(path)
    window.get_by_role("button", name="Open", exact=True).click()
    window.get_by_role("alert").get_by_text(sentence).wait_for()


@pytest.mark.slow
def test_a_page_for_other_machines_opens_no_folders(tmp_path, tiny_repo, browser):
    """On another address, such as that of a server."""
    place = {"GRADIO_SERVER_NAME": "127.0.0.2", "XDG_DATA_HOME": str(tmp_path)}
    with App(tmp_path / "log.txt", "--model", tiny_repo, **place) as app:
        page = new_page(browser)
        page.goto(f"{app.url}/?tab=Collection")
        open_tab_of_collections(page)
        assert page.locator("#c-path").count() == 0
        page.close()


def open_tab_of_collections(page):
    page.get_by_role("tab", name="Collection").click()
    page.get_by_text("Choose images or a zip").wait_for()


@pytest.mark.slow
def test_five_thousand_images_stay_fluid(window, tmp_path):
    """A page holds as many elements as with 20 images, and each step asks the server for one page."""
    folder = tmp_path / "thousands"
    folder.mkdir()
    tiny.images(1)[0].save(folder / "0000.png")
    for number in range(1, 5000):
        (folder / f"{number:04}.png").hardlink_to(folder / "0000.png")
    open_folder(window, folder)
    window.get_by_text("Page 1 of 250, 5000 images").wait_for()
    elements = "document.querySelectorAll('.collection *').length"
    before = window.evaluate(elements)
    requests = []
    window.on("request", lambda request: requests.append(request.post_data or ""))
    window.get_by_label("Go to page").fill("200")
    window.get_by_label("Go to page").press("Enter")
    window.locator("#c-rows li").first.get_by_text("3980.png").wait_for()
    window.get_by_label("Search").fill("4321")
    window.locator("#c-rows li").first.get_by_text("4321.png").wait_for()
    assert window.evaluate(elements) <= before
    assert len([data for data in requests if '"rows"' in data]) == 2
