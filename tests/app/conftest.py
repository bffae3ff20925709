"""The running app, its client, pictures, and a browser."""

import json
from urllib.parse import urlsplit

import pytest
import tiny
from transformers import Qwen2Tokenizer, pipeline

pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

from browsing import CHROMIUM, FLAGS, new_page  # noqa: E402
from running_app import App  # noqa: E402

from vlv.publish.card import model_card  # noqa: E402


@pytest.fixture(scope="session")
def repo(tmp_path_factory, tiny_model):
    """
    The tiny VLV with a tokenizer that reads its favourite letter as a space: its captions are words, and stream. It
    says that it was trained for a choice of length.
    """
    processor = tiny.processor()
    tokens = ["<|endoftext|>", *tiny.BYTES]
    letter, space = tokens.index("o"), tokens.index("\u0120")
    tokens[letter], tokens[space] = tokens[space], tokens[letter]
    processor.tokenizer = Qwen2Tokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    folder = tmp_path_factory.mktemp("repo")
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "nested_queries": True}))
    model_card(folder, "user/name", tiny_model, [], "mit").save(folder / "README.md")
    return folder


@pytest.fixture(scope="session")
def app(tmp_path_factory, repo):
    home = tmp_path_factory.mktemp("app")
    with App(home / "log.txt", "--model", repo, XDG_DATA_HOME=str(home / "data")) as app:
        app.data = home / "data"
        yield app


@pytest.fixture(scope="session")
def client(app):
    return app.client()


@pytest.fixture(scope="session")
def captioner(repo):
    return pipeline("image-to-text", model=str(repo), trust_remote_code=True)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    files = []
    for number, image in enumerate(tiny.images(8, seed=7)):
        files.append(folder / f"picture-{number}.png")
        image.save(files[-1])
    return files


@pytest.fixture(scope="module")
def browser():
    """Its event loop runs in this thread, so it must end before another module calls `asyncio.run`."""
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
    page = new_page(browser, viewport={"width": 1200, "height": 1000})
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(app.url)
    page.get_by_role("tab", name="Caption").wait_for()
    yield page
    page.close()
    assert {host for host in hosts if host} == {urlsplit(app.url).netloc}
    assert not errors


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests in a browser are slow."""
    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker("slow")
