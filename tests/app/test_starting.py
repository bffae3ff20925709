"""Ways to start the app."""

import os
import subprocess
import sys
from urllib.request import urlopen

import pytest
import tiny
from hub_server import READ_TOKEN
from paths import ROOT
from running_app import NEW_TOKENS, App, caption_of, upload

import vlv
from vlv.images import find_images
from vlv.publish.space import build_space_repo


def test_share_and_auth_are_passed_on(monkeypatch):
    import spaces_app

    class Page:
        def launch(self, **settings):
            self.settings = settings

    page = Page()
    monkeypatch.setattr(spaces_app, "Studio", lambda model: model)
    monkeypatch.setattr(spaces_app, "build_app", lambda *arguments: page)
    spaces_app.main(["--model", "m", "--share", "--auth", "ada:love:lace"])
    assert (page.settings["share"], page.settings["auth"]) == (True, ("ada", "love:lace"))
    spaces_app.main(["--model", "m"])
    assert (page.settings["share"], page.settings["auth"]) == (False, None)


def test_a_bundled_checkpoint_is_found_by_its_name():
    import spaces_app

    assert spaces_app.find_model("vlv-tiny") == vlv.bundled_checkpoint("vlv-tiny")
    assert spaces_app.find_model() == vlv.bundled_checkpoint()
    assert spaces_app.find_model("ada/vlv") == "ada/vlv"


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
        assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {
            "/caption",
            "/caption_many",
        }


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
            assert "The model is **ada/vlv**" in page.read().decode()
    assert caption == caption_of(captioner, str(pictures[0]))


@pytest.mark.slow
def test_on_zero_gpu_every_endpoint_is_decorated(tmp_path, tiny_repo, pictures):
    """A stand-in for the `spaces` package, which Hugging Face installs on its ZeroGPU machines only."""
    (tmp_path / "spaces.py").write_text(
        "def GPU(function):\n    print('on ZeroGPU:', function.__name__, flush=True)\n    return function\n"
    )
    log = tmp_path / "log.txt"
    with App(log, "--model", tiny_repo, PYTHONPATH=str(tmp_path)) as app:
        for name in ("caption", "caption_many", "reconstruct", "compose"):
            assert f"on ZeroGPU: {name}\n" in log.read_text()
        assert app.client().predict(upload(pictures[0]), 8, api_name="/caption")
