"""Nobody waits for work that nobody wants: Stop in the page and over the API, and visitors who leave."""

import re
import time

import gradio_client
import httpx
import pytest
from browsing import choose_file, new_page, open_tab, press, set_number, status
from running_app import App, upload

# The app as it is, with a model whose every step takes a while and is counted in the log.
SLOW_APP = """
import time
import spaces_app
from vlv_app.studio import Studio

class SlowStudio(Studio):
    def __init__(self, model):
        super().__init__(model)
        self.model.unet.register_forward_pre_hook(lambda *arguments: self.wait("sampled"))
        self.model.caption_head.register_forward_pre_hook(lambda *arguments: self.wait("wrote"))

    def wait(self, what):
        print(what, flush=True)
        time.sleep(0.2)

spaces_app.Studio = SlowStudio
spaces_app.main()
"""


@pytest.fixture(scope="module")
def slow_app(tmp_path_factory, repo):
    folder = tmp_path_factory.mktemp("slow")
    (folder / "slow_app.py").write_text(SLOW_APP)
    with App(folder / "log.txt", "--model", repo, script=folder / "slow_app.py") as app:
        yield app


def steps(app):
    lines = app.log.read_text().splitlines()
    return lines.count("sampled") + lines.count("wrote")


def wait_for_steps(app, count):
    while steps(app) < count:
        assert app.process.poll() is None
        time.sleep(0.05)


def leave_the_stream(app, picture):
    """As a browser whose tab is closed: the connection ends in the middle of the answer."""
    with picture.open("rb") as file:
        (path,) = httpx.post(f"{app.url}/gradio_api/upload", files={"files": file}).json()
    data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, 50, 2, 0, None]}
    before = steps(app)
    event = httpx.post(f"{app.url}/gradio_api/call/reconstruct", json=data).json()["event_id"]
    with httpx.stream("GET", f"{app.url}/gradio_api/call/reconstruct/{event}", timeout=600) as answer:
        lines = answer.iter_lines()
        while steps(app) < before + 2:
            next(lines)


def cancel(app, picture):
    before = steps(app)
    job = app.client().submit(upload(picture), 50, api_name="/reconstruct")
    wait_for_steps(app, before + 2)
    job.cancel()


def cancel_a_caption_by_beams(app, picture):
    before = steps(app)
    job = app.client().submit(upload(picture), 300, 3, api_name="/caption")
    wait_for_steps(app, before + 2)
    job.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("leave", [leave_the_stream, cancel, cancel_a_caption_by_beams])
def test_abandoned_runs_keep_nobody_waiting(slow_app, pictures, leave):
    """As many runs as the app computes at once, 50 steps or 300 tokens each, and then one more visitor."""
    before = steps(slow_app)
    for picture in pictures[:2]:
        leave(slow_app, picture)
    composed = slow_app.client().predict(upload(pictures[0]), upload(pictures[1]), 0.5, 2, api_name="/compose")
    assert composed
    assert steps(slow_app) - before < 40


@pytest.mark.slow
def test_stop_in_the_page_ends_the_run(slow_app, browser, pictures):
    page = new_page(browser)
    page.goto(slow_app.url)
    tab = open_tab(page, "Reconstruct")
    choose_file(page, pictures[0])
    set_number(tab, "Steps", 50)
    for _ in range(2):
        before = steps(slow_app)
        press(page, "Reconstruct")
        status(page).get_by_text("Rebuilding: step").wait_for()
        wait_for_steps(slow_app, before + 2)
        press(page, "Stop")
        status(page).get_by_text("Stopped.").wait_for()
        composed = slow_app.client().predict(upload(pictures[0]), upload(pictures[1]), 0.5, 2, api_name="/compose")
        assert composed and steps(slow_app) - before < 40
        assert status(page).inner_text() == "Stopped."  # nothing of the run comes later
    page.close()


@pytest.mark.slow
def test_stop_has_the_last_word(slow_app, browser, pictures):
    """Whatever moment it is pressed at: what the run has sent before must not come after it."""
    page = new_page(browser)
    page.goto(slow_app.url)
    tab = open_tab(page, "Reconstruct")
    choose_file(page, pictures[0])
    set_number(tab, "Steps", 50)
    for moment in range(12):
        press(page, "Reconstruct")
        status(page).get_by_text("Rebuilding: step").wait_for()
        page.wait_for_timeout(20 * moment)
        press(page, "Stop")
        status(page).get_by_text("Stopped.").wait_for()
        page.wait_for_timeout(300)
        assert status(page).inner_text() == "Stopped."
    page.close()


@pytest.mark.slow
def test_progress_tells_which_half_is_running(slow_app, browser, pictures):
    """Also while a beam search runs, which has no text until its end."""
    page = new_page(browser)
    page.goto(slow_app.url)
    tab = open_tab(page, "Reconstruct")
    choose_file(page, pictures[0])
    set_number(tab, "Steps", 20)
    press(page, "Reconstruct")
    status(page).get_by_text(re.compile(r"Rebuilding: step \d+ of 20")).wait_for()
    status(page).get_by_text(re.compile(r"Writing: \d+ tokens")).wait_for()
    press(page, "Stop")
    tab = open_tab(page, "Caption")
    set_number(tab, "Beams", 3)
    press(page, "Caption")
    status(page).get_by_text(re.compile(r"Writing: \d+ tokens")).wait_for()
    press(page, "Stop")
    page.close()


@pytest.mark.slow
def test_a_visitor_who_closes_the_page_keeps_nobody_waiting(slow_app, browser, pictures):
    before = steps(slow_app)
    for picture in pictures[:2]:
        page = new_page(browser)
        page.goto(slow_app.url)
        tab = open_tab(page, "Reconstruct")
        choose_file(page, picture)
        set_number(tab, "Steps", 50)
        now = steps(slow_app)
        press(page, "Reconstruct")
        wait_for_steps(slow_app, now + 2)
        page.close()
    client = gradio_client.Client(slow_app.url, verbose=False)
    assert client.predict(upload(pictures[0]), upload(pictures[1]), 0.5, 2, api_name="/compose")
    assert steps(slow_app) - before < 60
