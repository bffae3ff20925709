"""The app as its users meet it: over HTTP with `gradio_client`, and in a real browser."""

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import httpx
import numpy as np
import pytest
import tiny
import torch
from hub_server import READ_TOKEN
from paths import ROOT
from PIL import Image
from transformers import Qwen2Tokenizer, pipeline

from vlv.images import find_images
from vlv.publish.space import build_space_repo

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

EXAMPLE = sorted(ROOT.glob("vlv/publish/examples/*.png"))[0]
NEW_TOKENS = 24  # of the captions here: long enough to differ, short enough to be quick


class App:
    """`python spaces_app.py` as a process of its own, on a free port."""

    def __init__(self, log, *arguments, script=ROOT / "spaces_app.py", **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://{environment.get('GRADIO_SERVER_NAME', '127.0.0.1')}:{port}"
        self.log = Path(log)
        environment = {
            **os.environ,
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": str(self.log.parent / "uploads"),
            **environment,
        }
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(script), *map(str, arguments)],
                stdout=output,
                stderr=output,
                env=environment,
            )

    def __enter__(self):
        for _ in range(6000):  # importing everything takes minutes on a busy machine
            if "Running on local URL" in self.log.read_text():
                return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"The app did not start:\n{self.log.read_text()}")

    def __exit__(self, *error):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def client(self, **kwargs):
        return gradio_client.Client(self.url, verbose=False, **kwargs)


@pytest.fixture(scope="module")
def repo(tmp_path_factory, tiny_model):
    """The tiny VLV with a tokenizer that reads its favourite letter as a space: its captions are words, and stream."""
    processor = tiny.processor()
    tokens = ["<|endoftext|>", *tiny.BYTES]
    letter, space = tokens.index("o"), tokens.index("\u0120")
    tokens[letter], tokens[space] = tokens[space], tokens[letter]
    processor.tokenizer = Qwen2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    folder = tmp_path_factory.mktemp("repo")
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def app(tmp_path_factory, repo):
    with App(tmp_path_factory.mktemp("app") / "log.txt", "--model", repo) as app:
        yield app


@pytest.fixture(scope="module")
def client(app):
    return app.client()


@pytest.fixture(scope="module")
def captioner(repo):
    return pipeline("image-to-text", model=str(repo), trust_remote_code=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    files = []
    for number, image in enumerate(tiny.images(8, seed=7)):
        files.append(folder / f"picture-{number}.png")
        image.save(files[-1])
    return files


def upload(file):
    return gradio_client.handle_file(str(file))


def caption_of(captioner, image, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
    return captioner(image, **settings)[0]["generated_text"]


def pixels(image):
    return np.asarray(Image.open(image) if isinstance(image, (str, Path)) else image)


# ---- the endpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
def test_caption_is_the_pipelines(client, captioner, pictures, num_beams):
    caption = client.predict(upload(pictures[0]), NEW_TOKENS, num_beams, api_name="/caption")
    assert caption == caption_of(captioner, str(pictures[0]), num_beams=num_beams)


def test_caption_streams(client, pictures):
    job = client.submit(upload(pictures[0]), 100, api_name="/caption")
    caption = job.result()
    *parts, last = job.outputs()
    assert last == caption
    assert len(set(parts)) > 2
    assert all(caption.startswith(part.strip()) for part in parts)
    assert all(longer.startswith(part) for part, longer in zip(parts, parts[1:], strict=False))


def test_a_caption_that_fails_midway_ends_in_its_error(tiny_processor):
    import spaces_app

    class Failing(spaces_app.Studio):
        def __init__(self):
            self.processor = tiny_processor

        def _see(self, file):
            return None, None

        def _write(self, caption_embeds, streamer, **settings):
            streamer.put(torch.zeros(1, 0, dtype=torch.long))
            streamer.put(torch.tensor([65]))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(Failing().caption("picture.png"))


def test_reconstruct_is_the_models(client, captioner, pictures, tiny_model, tiny_processor):
    original, rebuilt, caption = client.predict(upload(pictures[0]), 3, 2.5, 11, api_name="/reconstruct")
    pixel_values = tiny_processor(images=str(pictures[0]))["pixel_values"]
    expected = tiny_model.reconstruct(
        pixel_values, num_inference_steps=3, guidance_scale=2.5, generator=torch.Generator().manual_seed(11)
    )
    assert np.array_equal(pixels(rebuilt), pixels(expected[0]))
    assert np.array_equal(pixels(original), pixels(pictures[0]))
    assert caption == caption_of(captioner, str(pictures[0]), max_new_tokens=300)


def test_compose_joins_a_share_of_each(client, pictures, tiny_model, tiny_processor):
    composed = client.predict(upload(pictures[0]), upload(pictures[1]), 0.3, 3, api_name="/compose")
    embeds = tiny_model.encode(tiny_processor(images=[str(file) for file in pictures[:2]])["pixel_values"])
    expected = tiny_model.reconstruct(  # 3 of the tiny model's 10 queries, then 7
        caption_embeds=torch.cat([embeds[:1, :3], embeds[1:, :7]], dim=1),
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
    )
    difference = pixels(composed).astype(int) - pixels(expected[0])
    assert np.abs(difference).max() <= 1  # the two were encoded as a batch here

    all_first = client.predict(upload(pictures[0]), upload(pictures[1]), 1, 3, api_name="/compose")
    _, alone, _ = client.predict(upload(pictures[0]), 3, api_name="/reconstruct")
    assert np.array_equal(pixels(all_first), pixels(alone))


def test_endpoints_are_described(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/caption", "/reconstruct", "/compose"}
    arguments = {
        name: [
            (each["parameter_name"], each["python_type"]["type"], each["parameter_has_default"])
            for each in endpoint["parameters"]
        ]
        for name, endpoint in endpoints.items()
    }
    sampling = [("num_inference_steps", "int", True), ("guidance_scale", "float", True), ("seed", "int", True)]
    images = {name: (name, "filepath", False) for name in ("image", "first", "second")}
    assert arguments["/caption"] == [images["image"], ("max_new_tokens", "int", True), ("num_beams", "int", True)]
    assert arguments["/reconstruct"] == [images["image"], *sampling]
    assert arguments["/compose"] == [images["first"], images["second"], ("share", "float", True), *sampling]
    for name, endpoint in endpoints.items():
        assert all(f"{argument}: " in endpoint["description"] for argument, *_ in arguments[name])


@pytest.mark.slow
def test_eight_clients_at_once(app, captioner, pictures):
    expected = [caption_of(captioner, str(file), max_new_tokens=8) for file in pictures]
    assert len(set(expected)) > 1  # or a mixed-up answer would not be noticed

    def ask(number):
        client = app.client()
        return [
            (index % 8, client.predict(upload(pictures[index % 8]), 8, api_name="/caption"))
            for index in range(number, number + 25)
        ]

    with ThreadPoolExecutor(8) as pool:
        answers = [answer for answers in pool.map(ask, range(8)) for answer in answers]
    assert len(answers) == 200
    assert all(caption == expected[index] for index, caption in answers)


# ---- files that are not plain pictures ---------------------------------------------------------------------


def bomb(file):
    """A PNG of 30,000 x 30,000 black pixels in a file of 110 kB."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    side = 30_000
    row = bytes(1 + side // 8)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(row * side, 9)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def cut_short(file):
    tiny.images(1)[0].save(file)
    file.write_bytes(file.read_bytes()[:-60])


UNREADABLE = {
    "empty.png": lambda file: file.write_bytes(b""),
    "text.png": lambda file: file.write_text("This is no picture."),
    "bomb.png": bomb,
    "cut.png": cut_short,
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_gets_one_sentence(app, client, captioner, pictures, tmp_path, name):
    file = tmp_path / name
    UNREADABLE[name](file)
    for arguments, endpoint in (
        ([upload(file)], "/caption"),
        ([upload(file)], "/reconstruct"),
        ([upload(pictures[0]), upload(file)], "/compose"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError) as error:
            client.predict(*arguments, api_name=endpoint)
        assert str(error.value).startswith(f"{name}: ")
        assert "\n" not in str(error.value)
        assert str(app.log.parent) not in str(error.value)
    assert "Traceback" not in app.log.read_text()
    caption = client.predict(upload(pictures[0]), NEW_TOKENS, api_name="/caption")
    assert caption == caption_of(captioner, str(pictures[0]))


def test_a_file_over_the_limit_is_refused(app, client, captioner, pictures, tmp_path):
    file = tmp_path / "large.bmp"
    Image.new("RGB", (3000, 3000)).save(file)  # 27 MB
    with pytest.raises(ValueError, match="exceeds the maximum file size"):  # said by gradio_client
        client.predict(upload(file), api_name="/caption")
    with file.open("rb") as content:  # and by the server to a client that does not ask first
        answer = httpx.post(f"{app.url}/gradio_api/upload", files={"files": content})
    assert answer.status_code == 413
    caption = client.predict(upload(pictures[0]), NEW_TOKENS, api_name="/caption")
    assert caption == caption_of(captioner, str(pictures[0]))


def sixteen_bit(picture, file):
    """A gradient over the whole range of 16 bits, of which clipping would leave a white picture."""
    Image.fromarray(np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)).save(file)
    return Image.fromarray(np.linspace(0, 255, 40 * 30).reshape(30, 40).round().astype(np.uint8)).convert("RGB")


def cmyk(picture, file):
    picture.convert("CMYK").save(file, quality=95)
    return Image.open(file).convert("RGB")


def animation(picture, file):
    frames = [frame.quantize() for frame in (picture, Image.new("RGB", picture.size, "red"))]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    return picture


def transparent(picture, file):
    alpha = Image.new("L", picture.size, 0)
    alpha.paste(255, (0, 0, 20, 30))
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, (0, 0), alpha)
    picture = picture.copy()
    picture.putalpha(alpha)
    picture.save(file)
    return white


def rotated(picture, file):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    picture.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    return picture


def single_pixel(picture, file):
    picture = Image.new("RGB", (1, 1), (200, 30, 90))
    picture.save(file)
    return picture


@pytest.mark.parametrize(
    "name, write",
    [
        ("sixteen-bit.tiff", sixteen_bit),
        ("cmyk.jpg", cmyk),
        ("animation.gif", animation),
        ("transparent.png", transparent),
        ("rotated.png", rotated),
        ("single-pixel.png", single_pixel),
    ],
)
def test_an_unusual_file_is_read_as_a_person_sees_it(client, captioner, tmp_path, name, write):
    expected = write(tiny.images(1, seed=3)[0], tmp_path / name)
    original, _, caption = client.predict(upload(tmp_path / name), 1, api_name="/reconstruct")
    shown = pixels(original)
    assert shown.shape == pixels(expected).shape
    assert np.abs(shown.astype(int) - pixels(expected)).max() <= 2
    assert caption == caption_of(captioner, Image.fromarray(shown), max_new_tokens=300)


@pytest.mark.parametrize(
    "arguments, endpoint, sentence",
    [
        ((None,), "/caption", "Choose an image first."),
        ((None, None), "/compose", "Choose an image first."),
        (("picture", 3, 2, None), "/reconstruct", "Give a seed"),
        (("picture", 0), "/reconstruct", "less than"),
        (("picture", 24, 99), "/caption", "greater than"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(client, pictures, arguments, endpoint, sentence):
    arguments = [upload(pictures[0]) if argument == "picture" else argument for argument in arguments]
    with pytest.raises(gradio_client.exceptions.AppError, match=sentence):
        client.predict(*arguments, api_name=endpoint)


# ---- ways to start it --------------------------------------------------------------------------------------


def test_share_and_auth_are_passed_on(monkeypatch):
    import spaces_app

    class Page:
        def launch(self, **settings):
            self.settings = settings

    page = Page()
    monkeypatch.setattr(spaces_app, "Studio", lambda model: model)
    monkeypatch.setattr(spaces_app, "build_app", lambda studio: page)
    spaces_app.main(["--model", "m", "--share", "--auth", "ada:love:lace"])
    assert (page.settings["share"], page.settings["auth"]) == (True, ("ada", "love:lace"))
    spaces_app.main(["--model", "m"])
    assert (page.settings["share"], page.settings["auth"]) == (False, None)


@pytest.mark.slow
def test_a_captioner_has_one_tab_and_asks_for_its_password(tmp_path, tiny_processor):
    repo = tmp_path / "captioner"
    tiny.model(decoder_config=None).save_pretrained(repo)
    tiny_processor.save_pretrained(repo)
    # Another address of this machine, which is the host that visitors must ask for.
    place = {"GRADIO_SERVER_NAME": "127.0.0.2"}
    with App(tmp_path / "log.txt", "--model", repo, "--auth", "ada:love:lace", **place) as app:
        with pytest.raises(Exception, match="401|credentials|auth"):
            app.client()
        client = app.client(auth=("ada", "love:lace"))
        assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {"/caption"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--auth", "ada"], "USER:PASSWORD"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, sentence):
    command = [sys.executable, str(ROOT / "spaces_app.py"), *arguments]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    )
    assert run.returncode != 0
    (line,) = [line for line in run.stderr.splitlines() if "error:" in line]
    assert sentence in line
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_the_space_serves_the_model_on_the_hub(tmp_path, repo, hub, captioner, pictures):
    """The Space's own files, started as Hugging Face starts them, with an empty cache."""
    hub.publish("ada/vlv", repo, private=True)
    space = tmp_path / "space"
    space.mkdir()
    build_space_repo(space, "ada/vlv", find_images([pictures[0].parent]), "mit")
    log = tmp_path / "log.txt"
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    secrets = {"HF_TOKEN": READ_TOKEN, "HF_HOME": str(tmp_path / "home")}
    with App(log, script=space / "spaces_app.py", **online, **secrets) as app:
        caption = app.client().predict(upload(pictures[0]), NEW_TOKENS, api_name="/caption")
        with urlopen(app.url) as page:
            assert "This one is **ada/vlv**" in page.read().decode()
    assert caption == caption_of(captioner, str(pictures[0]))


@pytest.mark.slow
def test_on_zero_gpu_every_endpoint_is_decorated(tmp_path, tiny_repo, pictures):
    """A stand-in for the `spaces` package, which Hugging Face installs on its ZeroGPU machines only."""
    (tmp_path / "spaces.py").write_text(
        "def GPU(function):\n    print('on ZeroGPU:', function.__name__, flush=True)\n    return function\n"
    )
    log = tmp_path / "log.txt"
    with App(log, "--model", tiny_repo, PYTHONPATH=str(tmp_path)) as app:
        for name in ("caption", "reconstruct", "compose"):
            assert f"on ZeroGPU: {name}\n" in log.read_text()
        assert app.client().predict(upload(pictures[0]), 8, api_name="/caption")


# ---- in a browser ------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("NOT SEEN IN A BROWSER: there is no Chromium here (apt-get install chromium, as .ci/run does)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, app):
    """The open app; the test fails when the page has asked any other host for anything, or logged an error."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(app.url)
    page.get_by_role("tab", name="Caption").wait_for()
    yield page
    page.close()
    assert {host for host in hosts if host} == {urlsplit(app.url).netloc}
    assert not errors


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()
    tab = page.locator("[role=tabpanel]:visible")
    tab.get_by_role("button", name=name, exact=True).wait_for()
    return tab


def choose_file(tab, label, file):
    """Upload through the image component under a label, and wait until it shows the picture."""
    component = block(tab, label)
    component.locator("input[type=file]").set_input_files(file)
    component.locator("img").wait_for()


def block(tab, label):
    return tab.locator(".block").filter(has=tab.page.get_by_test_id("block-label").filter(has_text=label)).last


def set_number(tab, label, value):
    field = tab.get_by_role("spinbutton", name=re.compile(label))
    field.fill(str(value))
    field.press("Tab")


def picture_in(tab, label):
    """The pixels of the picture on show under a label."""
    image = block(tab, label).locator("img")
    image.wait_for()
    with urlopen(image.get_attribute("src")) as response:
        return pixels(Image.open(response))


def test_caption_in_the_browser(page, captioner, pictures):
    tab = open_tab(page, "Caption")
    choose_file(tab, "Image", pictures[2])
    tab.get_by_text("Settings").click()
    set_number(tab, "Longest caption", 200)
    # Every text that the box shows, in order.
    tab.locator("textarea").evaluate(
        """area => {
            window.shown = [];
            const look = () => { if (window.shown.at(-1) !== area.value) window.shown.push(area.value); };
            window.looking = setInterval(look, 1);
        }"""
    )
    tab.get_by_role("button", name="Caption", exact=True).click()
    expected = caption_of(captioner, str(pictures[2]), max_new_tokens=200)
    page.wait_for_function("text => window.shown.at(-1) === text", arg=expected)
    shown = [text for text in page.evaluate("window.shown") if text]
    assert len(shown) > 1
    assert all(expected.startswith(text.strip()) for text in shown)


def test_reconstruct_in_the_browser(page, client, pictures):
    tab = open_tab(page, "Reconstruct")
    choose_file(tab, "Image", pictures[3])
    tab.get_by_text("Settings").click()
    set_number(tab, "Steps", 40)
    set_number(tab, "Seed", 5)
    tab.get_by_role("button", name="Reconstruct", exact=True).click()
    tab.get_by_text(re.compile(r"\b\d+/40 steps")).first.wait_for()  # the progress bar
    _, rebuilt, caption = client.predict(upload(pictures[3]), 40, 2, 5, api_name="/reconstruct")
    assert np.array_equal(picture_in(tab, "Reconstruction"), pixels(rebuilt))
    assert np.array_equal(picture_in(tab, "Original"), pixels(pictures[3]))
    assert tab.locator("textarea").input_value() == caption


def test_compose_in_the_browser(page, client, pictures):
    tab = open_tab(page, "Compose")
    choose_file(tab, "First image", pictures[0])
    choose_file(tab, "Second image", pictures[1])
    slider = tab.get_by_role("slider", name=re.compile("Share"))
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    share = float(slider.input_value())
    assert 0.7 < share < 0.9
    tab.get_by_role("button", name="Compose", exact=True).click()
    composed = client.predict(upload(pictures[0]), upload(pictures[1]), share, api_name="/compose")
    assert np.array_equal(picture_in(tab, "Composition"), pixels(composed))


def test_an_example_in_the_browser(page, client):
    tab = open_tab(page, "Reconstruct")
    tab.locator(".gallery-item").first.click()
    block(tab, "Image").locator("img").wait_for()
    tab.get_by_role("button", name="Reconstruct", exact=True).click()
    _, rebuilt, _ = client.predict(upload(EXAMPLE), api_name="/reconstruct")
    assert np.array_equal(picture_in(tab, "Reconstruction"), pixels(rebuilt))


@pytest.mark.parametrize("name", ["empty.png", "text.png", "bomb.png", "large.bmp"])
def test_a_bad_file_in_the_browser(page, captioner, pictures, tmp_path, name):
    """One friendly sentence, no traceback, and the same page goes on."""
    file = tmp_path / name
    if name == "large.bmp":
        Image.new("RGB", (3000, 3000)).save(file)
        sentence = re.compile("maximum (allowed )?(file )?size")
    else:
        UNREADABLE[name](file)
        sentence = re.compile(rf"^{name}: ")
    tab = open_tab(page, "Caption")
    tab.locator("input[type=file]").set_input_files(file)
    if name != "large.bmp":
        page.wait_for_load_state("networkidle")
        tab.get_by_role("button", name="Caption", exact=True).click()
    page.get_by_text(sentence).first.wait_for()
    assert "Traceback" not in page.content()

    page.reload()
    tab = open_tab(page, "Caption")
    choose_file(tab, "Image", pictures[0])
    tab.get_by_role("button", name="Caption", exact=True).click()
    expected = caption_of(captioner, str(pictures[0]), max_new_tokens=300)
    page.wait_for_function(
        "text => [...document.querySelectorAll('textarea')].some(a => a.value === text)", arg=expected
    )
