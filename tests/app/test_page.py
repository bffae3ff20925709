"""The page in a browser: what it shows is true, and it keeps what visitors gave it."""

import re
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
import tiny
from browsing import (
    PATIENCE,
    choose_file,
    new_page,
    open_tab,
    picture,
    pixels_of,
    press,
    set_number,
    status,
    wait_until_done,
)
from PIL import Image
from running_app import EXAMPLE, App, caption_of, pixels, upload
from test_odd_files import UNREADABLE

from vlv_app.page import build_app
from vlv_app.studio import Studio

RESULTS = "#caption-text textarea, #captions, #comparison, #rebuilt, #rebuilt-caption textarea, #composed"

# On a busy machine the picture that a link names is shown before Gradio says that the page is there.
PAGE_AFTER_PICTURE = """
    const picture = new Promise((resolve) => document.addEventListener("vlv:picture", resolve));
    let page;
    Object.defineProperty(window, "vlv", {
        get: () => page,
        set: (functions) => { page = { ...functions, loaded: () => picture.then(functions.loaded) }; },
    });
"""


def caption_box(page):
    return page.locator("#caption-text textarea")


def everything_shown(page):
    """The contents of all outputs, whichever tab they are in."""
    return page.evaluate(
        """outputs => [...document.querySelectorAll(outputs)].map(
            (each) => each.value ?? [...each.querySelectorAll('img')].map((image) => image.src).join() + each.innerText
        ).filter((text) => text.trim())""",
        RESULTS,
    )


def test_a_caption_streams_and_says_when_it_was_cut(page, captioner, pictures):
    tab = open_tab(page, "Caption")
    choose_file(page, pictures[2])
    set_number(tab, "Longest caption", 200)
    # Every text that the box shows, in order.
    caption_box(page).evaluate(
        """area => {
            window.shown = [];
            const look = () => { if (window.shown.at(-1) !== area.value) window.shown.push(area.value); };
            window.looking = setInterval(look, 1);
        }"""
    )
    press(page, "Caption")
    expected = caption_of(captioner, str(pictures[2]), max_new_tokens=200)
    page.wait_for_function("text => window.shown.at(-1) === text", arg=expected)
    shown = [text for text in page.evaluate("window.shown") if text]
    assert len(shown) > 1
    assert all(expected.startswith(text.strip()) for text in shown)
    # The random model never ends a caption by itself.
    wait_until_done(page, "Done: 200 tokens. The caption was cut at the longest length")


def test_reconstruct_and_its_slider(page, client, pictures):
    tab = open_tab(page, "Reconstruct")
    choose_file(page, pictures[3])
    set_number(tab, "Steps", 3)
    set_number(tab, "Seed", 5)
    set_number(tab, "Number of pictures", 2)
    press(page, "Reconstruct")
    wait_until_done(page)
    rebuilt = page.locator("#rebuilt figure")
    assert rebuilt.count() == 2
    for place, seed in enumerate((5, 6)):
        _, expected, caption = client.predict(upload(pictures[3]), 3, 2, seed, api_name="/reconstruct")
        assert np.array_equal(pixels_of(rebuilt.nth(place).locator("img")), pixels(expected))
        with page.expect_download() as download:
            rebuilt.nth(place).get_by_role("link").click()
        assert download.value.suggested_filename == f"picture-3-rebuilt-seed-{seed}.png"
        assert np.array_equal(pixels(download.value.path()), pixels(expected))
    assert page.locator("#rebuilt-caption textarea").input_value() == caption
    assert np.array_equal(pixels_of(page.get_by_alt_text("Original", exact=True)), pixels(pictures[3]))
    slider = page.get_by_role("slider", name=re.compile("Original to the left"))
    slider.fill("20")
    clip = page.get_by_alt_text("Reconstruction", exact=True).evaluate("image => getComputedStyle(image).clipPath")
    assert clip == "inset(0px 0px 0px 20%)"


@pytest.mark.slow
def test_edited_words_are_drawn(page, pictures, tiny_model, tiny_processor):
    import torch

    tab = open_tab(page, "Reconstruct")
    choose_file(page, pictures[0])
    set_number(tab, "Steps", 2)
    page.locator("#rebuilt-caption textarea").fill("two dogs")
    press(page, "Draw these words")
    page.locator("#drawn img").wait_for()
    tokenizer, length = tiny_processor.decoder_tokenizer, tiny.POSITIONS
    ids = tokenizer(
        "two dogs", padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():  # the decoder's own way from words to a context
        context = tiny_model.text_encoder(input_ids=ids)
    embeds = tiny_model.text_encoder.embeddings.token_embedding(ids).detach()
    assert torch.allclose(tiny_model.encode_context(embeds), context, atol=1e-5)
    (expected,) = tiny_model.reconstruct(
        caption_embeds=embeds, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    )
    difference = pixels_of(page.locator("#drawn img")).astype(int) - pixels(expected)
    assert np.abs(difference).max() <= 1
    page.locator("#drawn").get_by_text("two dogs").wait_for()


@pytest.mark.slow
def test_compose_and_several_shares(page, client, pictures):
    tab = open_tab(page, "Compose")
    choose_file(page, pictures[0])
    choose_file(page, pictures[1], "second")
    slider = tab.get_by_role("slider", name=re.compile("Share"))
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    share = float(slider.input_value())
    assert 0.7 < share < 0.9
    press(page, "Compose")
    wait_until_done(page, "The picture is composed.")
    composed = client.predict(upload(pictures[0]), upload(pictures[1]), share, api_name="/compose")
    assert np.array_equal(pixels_of(page.locator("#composed img")), pixels(composed))

    tab.get_by_label("Words").fill("a dog")
    press(page, "Compose")
    wait_until_done(page, "The picture is composed.")
    composed = client.predict(upload(pictures[0]), upload(pictures[1]), share, text="a dog", api_name="/compose")
    assert np.array_equal(pixels_of(page.locator("#composed img")), pixels(composed))
    tab.get_by_label("Words").fill("")

    set_number(tab, "Number of shares", 2)
    set_number(tab, "Steps", 3)
    press(page, "Compose several shares")
    wait_until_done(page, "2 pictures are composed.")
    figures = page.locator("#composed figure")
    for place, (file, label) in enumerate(((pictures[0], "100%"), (pictures[1], "0%"))):
        _, alone, caption = client.predict(upload(file), 3, api_name="/reconstruct")
        figure = figures.nth(place)
        assert np.array_equal(pixels_of(figure.locator("img")), pixels(alone))
        assert f"{label} of the first image" in figure.inner_text()
        assert " ".join(caption.split()) in " ".join(figure.inner_text().split())

    tab.get_by_label("interpolate").check()
    set_number(tab, "Number of shares", 3)
    press(page, "Compose several shares")
    wait_until_done(page, "3 pictures are composed.")
    images = [upload(pictures[0]), upload(pictures[1])]
    between = client.predict(*images, 0.5, 3, method="interpolate", api_name="/compose")
    assert np.array_equal(pixels_of(page.locator("#composed figure").nth(1).locator("img")), pixels(between))


def test_one_upload_serves_all_tabs_and_a_reload(page, captioner, pictures):
    tab = open_tab(page, "Caption")
    choose_file(page, pictures[4])
    tab.get_by_label("Beginning").fill("a dog")
    set_number(tab, "Longest caption", 24)
    open_tab(page, "Reconstruct")
    press(page, "Reconstruct")
    wait_until_done(page)
    page.locator("#rebuilt img").wait_for()
    assert "tab=Reconstruct" in page.url
    page.reload()
    page.locator("[role=tabpanel]:visible").get_by_role("button", name="Reconstruct", exact=True).wait_for()
    picture(page).get_by_text("picture-4.png").wait_for()
    tab = open_tab(page, "Caption")
    assert tab.get_by_label("Beginning").input_value() == "a dog"
    tab.get_by_role("button", name="Settings").click()
    assert tab.get_by_role("spinbutton", name=re.compile("Longest")).first.input_value() == "24"
    tab.get_by_label("Beginning").fill("")
    press(page, "Caption")
    wait_until_done(page)
    assert caption_box(page).input_value() == caption_of(captioner, str(pictures[4]))
    caption_box(page).fill("my own words")
    caption_box(page).press("Tab")
    page.reload()
    picture(page).get_by_text("picture-4.png").wait_for()
    page.wait_for_function("document.querySelector('#caption-text textarea').value === 'my own words'")
    page.goto(f"{page.url.partition('?')[0]}?image=gone/picture.png")
    picture(page).get_by_role("alert").get_by_text("does not have this picture any more").wait_for()
    assert everything_shown(page) == []


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another", "remove", "unreadable"])
def test_no_result_stands_beside_another_picture(page, pictures, tmp_path, change):
    """Neither now, nor when a late answer comes: the runs end with their picture."""
    choose_file(page, pictures[0])
    tab = open_tab(page, "Compose")
    choose_file(page, pictures[1], "second")
    set_number(tab, "Steps", 2)
    press(page, "Compose")
    wait_until_done(page, "The picture is composed.")
    tab = open_tab(page, "Reconstruct")
    set_number(tab, "Steps", 2)
    press(page, "Reconstruct")
    wait_until_done(page)
    open_tab(page, "Caption")
    press(page, "Caption")
    page.wait_for_function("document.querySelector('#caption-text textarea').value")
    assert len(everything_shown(page)) == 5
    if change == "remove":
        picture(page).get_by_role("button", name="Remove").click()
    elif change == "another":
        choose_file(page, pictures[5])
    else:
        file = tmp_path / "text.png"
        UNREADABLE["text.png"](file)
        picture(page).locator("input[type=file]").set_input_files(file)
        picture(page).get_by_role("alert").get_by_text("Image, text.png: ").wait_for()
    page.wait_for_function(f"!document.querySelector('{RESULTS.split(',')[0]}').value")
    assert everything_shown(page) == []
    page.wait_for_timeout(1000)
    assert everything_shown(page) == []


@pytest.mark.slow
def test_a_failing_run_leaves_no_result_and_its_sentence_stays(page, pictures):
    tab = open_tab(page, "Reconstruct")
    choose_file(page, pictures[0])
    set_number(tab, "Steps", 2)
    press(page, "Reconstruct")
    wait_until_done(page)
    set_number(tab, "Seed", -1)
    press(page, "Reconstruct")
    sentence = page.get_by_text("Seed is -1: give a whole number from 0 to 2147483647.")
    sentence.wait_for()
    page.wait_for_function("!document.querySelector('#rebuilt img')")
    assert everything_shown(page) == []
    page.wait_for_timeout(11_000)  # Gradio's own errors go after ten seconds
    assert sentence.is_visible()


def test_a_missing_picture_is_named(page, pictures):
    open_tab(page, "Compose")
    press(page, "Compose")
    page.get_by_text("Image: choose a picture first.").wait_for()
    choose_file(page, pictures[0])
    press(page, "Compose")
    page.get_by_text("Second image: choose a picture first.").wait_for()


def see_through(file):
    image = Image.new("RGBA", (300, 200), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 150, 200))
    image.save(file)


def tiff(file):
    Image.linear_gradient("L").resize((300, 200)).convert("RGB").save(file)


def photo(file):
    Image.radial_gradient("L").resize((3000, 2000)).convert("RGB").save(file, quality=90)


def heic(file):
    pytest.importorskip("pillow_heif").from_pillow(Image.linear_gradient("L").convert("RGB")).save(file)


def avif(file):
    Image.linear_gradient("L").convert("RGB").save(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, write",
    [
        ("see-through.png", see_through),
        ("scan.tiff", tiff),
        ("photo.jpg", photo),
        ("phone.heic", heic),
        ("phone.avif", avif),
    ],
)
def test_a_picture_is_shown_as_the_model_sees_it(page, tiny_processor, tmp_path, name, write):
    write(tmp_path / name)
    choose_file(page, tmp_path / name)
    image = picture(page).locator(".drop img")
    expected = tiny_processor.preprocess_image(str(tmp_path / name))
    expected.thumbnail((768, 768))
    assert np.array_equal(pixels_of(image), pixels(expected))
    assert image.evaluate("image => image.naturalWidth") > 0
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "auto"
    corner = image.evaluate(  # nothing lies over the picture
        """image => { const box = image.getBoundingClientRect();
            return [[2, 2], [box.width - 3, 2], [2, box.height - 3], [box.width - 3, box.height - 3]].every(
                ([x, y]) => document.elementFromPoint(box.left + x, box.top + y) === image); }"""
    )
    assert corner


def test_what_the_model_is_for_stands_beside_the_upload(page):
    page.locator("#shared").get_by_text("It cannot caption photographs.").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["empty.png", "text.png", "bomb.png", "large.bmp"])
def test_a_bad_file_in_the_browser(page, captioner, pictures, tmp_path, name):
    """One sentence beside the input, which stays until another picture is chosen, and no traceback."""
    file = tmp_path / name
    if name == "large.bmp":
        Image.new("RGB", (3000, 3000)).save(file)
    else:
        UNREADABLE[name](file)
    picture(page).locator("input[type=file]").set_input_files(file)
    alert = picture(page).get_by_role("alert")
    alert.get_by_text(f"Image, {name}: ").wait_for()
    if name == "text.png":
        assert "JPEG, PNG, GIF" in alert.inner_text() and "HEIC" in alert.inner_text()
    if name == "large.bmp":
        assert "20 MB is the maximum file size" in alert.inner_text()
    assert "Traceback" not in page.content()
    open_tab(page, "Caption")
    choose_file(page, pictures[0])
    assert alert.inner_text() == ""
    press(page, "Caption")
    wait_until_done(page)
    assert caption_box(page).input_value() == caption_of(captioner, str(pictures[0]), max_new_tokens=300)


@pytest.mark.slow
def test_several_captions_with_a_temperature(page, pictures):
    tab = open_tab(page, "Caption")
    choose_file(page, pictures[0])
    set_number(tab, "Longest caption", 24)
    set_number(tab, "Number of captions", 3)
    press(page, "Caption")
    page.get_by_text("Number of captions is 3: give a Temperature above 0").wait_for()
    set_number(tab, "Temperature", 1)
    press(page, "Caption")
    wait_until_done(page)
    rows = page.locator("#captions li")
    assert rows.count() == 3
    texts = [row.locator("span").inner_text() for row in rows.all()]
    assert len(set(texts)) == 3

    def draw(seed):
        set_number(tab, "Seed", seed)
        press(page, "Caption")
        wait_until_done(page)
        return [row.locator("span").inner_text() for row in rows.all()]

    assert draw(7) != texts
    assert draw(0) == texts
    rows.nth(2).get_by_role("button", name="Take").click()
    assert caption_box(page).input_value().split() == texts[2].split()


@pytest.mark.slow
def test_an_edited_caption_is_downloaded_and_a_link_opens_the_result(page, browser, captioner, pictures):
    tab = open_tab(page, "Caption")
    choose_file(page, pictures[1])
    set_number(tab, "Longest caption", 24)
    tab.get_by_role("button", name="Words").click()
    tab.get_by_label("Trigger words").fill("ohwx")
    tab.get_by_label("Tags").check()
    press(page, "Caption")
    wait_until_done(page)
    press(page, "Link to this result")
    link = page.locator("#link a")
    link.wait_for()
    address = link.get_attribute("href")
    asked = dict(parse_qsl(urlsplit(address).query))
    settings = {"max_new_tokens": "24", "num_beams": "1", "temperature": "0", "num_captions": "1"}
    settings |= {"seed": "0", "num_queries": "10"}
    words = {"trigger_words": "ohwx", "clean_tags": "true"}
    assert asked == {"tab": "Caption", "image": asked["image"], **settings, **words}  # as the API names them
    caption_box(page).fill("my own words")
    with page.expect_download() as download:
        press(page, "Download as text")
    assert download.value.suggested_filename == "picture-1.txt"
    assert download.value.path().read_text() == "my own words\n"

    expected = f"ohwx, {caption_of(captioner, str(pictures[1]))}"
    for slow in ("", PAGE_AFTER_PICTURE):
        visitor = browser.new_context().new_page()
        visitor.set_default_timeout(PATIENCE)
        visitor.add_init_script(slow)
        visitor.goto(address)
        is_there = "text => document.querySelector('#caption-text textarea')?.value === text"
        visitor.wait_for_function(is_there, arg=expected)
        visitor.context.close()

    # In a window with other settings, those of the link hold; the link does not name what is empty.
    tab.get_by_label("Before the caption").fill("mine: ")
    tab.get_by_label("Before the caption").blur()
    page.goto(address)
    page.wait_for_function(is_there, arg=expected)


@pytest.mark.slow
def test_fields_are_kept_for_the_model_that_they_were_set_for(page, repo):
    set_number(open_tab(page, "Caption"), "Queries", 2)
    page.reload()
    open_tab(page, "Caption")
    kept = "model => vlv.restore('Caption', model, ['num_queries'], [10])[0]"
    assert page.evaluate(kept, repo.name) == 2
    assert page.evaluate(kept, "another") == 10


@pytest.mark.slow
def test_a_smaller_number_of_queries(page, client, captioner, pictures):
    tab = open_tab(page, "Caption")
    choose_file(page, pictures[0])
    set_number(tab, "Longest caption", 24)
    set_number(tab, "Queries", 2)
    press(page, "Caption")
    wait_until_done(page)
    assert caption_box(page).input_value() == caption_of(captioner, str(pictures[0]), num_queries=2)
    tab = open_tab(page, "Reconstruct")
    set_number(tab, "Steps", 3)
    set_number(tab, "Queries", 2)
    press(page, "Reconstruct")
    wait_until_done(page)
    _, rebuilt, _ = client.predict(upload(pictures[0]), 3, num_queries=2, api_name="/reconstruct")
    assert np.array_equal(pixels_of(page.locator("#rebuilt img")), pixels(rebuilt))


def test_queries_are_offered_where_a_model_was_trained_for_fewer(repo, tiny_repo):
    def offered(model):
        visible = build_app(Studio(str(model))).config["components"]
        return [each["props"].get("label") for each in visible if each["props"].get("label") == "Queries"]

    assert len(offered(repo)) - len(offered(tiny_repo)) == 2  # in Caption and Reconstruct


@pytest.mark.slow
def test_an_example(page, client):
    picture(page).get_by_role("button", name="Example 1").click()
    picture(page).locator(".drop img").wait_for()
    tab = open_tab(page, "Reconstruct")
    set_number(tab, "Steps", 3)
    press(page, "Reconstruct")
    wait_until_done(page)
    _, rebuilt, _ = client.predict(upload(EXAMPLE), 3, api_name="/reconstruct")
    assert np.array_equal(pixels_of(page.locator("#rebuilt img")), pixels(rebuilt))


def test_another_visitors_files_are_out_of_reach(page, app):
    """A picture's id is a place in the folder of uploads, and nothing else."""
    page.goto(f"{app.url}/?tab=Caption&image=../../../../../../etc/passwd")
    alert = picture(page).get_by_role("alert")
    alert.get_by_text("the server does not have this picture any more").wait_for()
    assert status(page).inner_text() == ""


@pytest.mark.slow
def test_on_a_phone_the_result_comes_into_view(browser, app, pictures):
    page = new_page(browser, viewport={"width": 390, "height": 800})
    page.goto(app.url)
    open_tab(page, "Reconstruct")
    choose_file(page, pictures[0])
    page.evaluate("scrollTo(0, 0)")
    press(page, "Reconstruct")
    wait_until_done(page)
    page.wait_for_function(
        "(() => { const box = document.querySelector('#comparison').getBoundingClientRect();"
        " return box.width > 250 && box.top >= 0 && box.top < innerHeight * 0.8; })()"
    )
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()


# The app with a model whose teacher keeps no text encoder.
WITHOUT_WORDS = """
import spaces_app
from vlv_app.studio import Studio

Studio.draws_words = property(lambda self: False)
spaces_app.main()
"""


@pytest.mark.slow
def test_a_model_that_reads_no_words_composes_without_them(browser, repo, pictures, tmp_path):
    (tmp_path / "app.py").write_text(WITHOUT_WORDS)
    with App(tmp_path / "log.txt", "--model", repo, script=tmp_path / "app.py") as app:
        page = new_page(browser)
        page.goto(app.url)
        tab = open_tab(page, "Compose")
        choose_file(page, pictures[0])
        choose_file(page, pictures[1], "second")
        press(page, "Compose")
        wait_until_done(page, "The picture is composed.")
        assert tab.get_by_label("Words").count() == 0
        page.close()
