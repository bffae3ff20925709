"""Fixtures that the tests share. Tests must not change the result of a session fixture; they change a copy."""

import gc
import os
import re

# Set before any library reads them: no test may access the Hub, and workers must not compete for the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("PYTHONUNBUFFERED", None)  # a user's shell does not set it, and it hides that output comes late
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import huggingface_hub
import pytest
import tiny
import torch
import transformers
from hub_server import WRITE_TOKEN, running_hub
from installed_wheel import Installed, build_wheel
from transformers.utils import logging

from vlv.scenes import write_scenes

logging.disable_progress_bar()
# transformers compiles a regular expression for each weight that it loads or saves. Python's cache of 512 is too small
# for one model, so that every test would compile the same ones again.
re._MAXCACHE = 100_000


def pytest_collection_finish():
    """What is imported by now stays. The garbage collection before each training need not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Makes the output and the log of a test valid UTF-8 for the workers, also with file names that are not UTF-8."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    """A `VLVConfig` in which every part is tiny."""
    return tiny.config()


@pytest.fixture(scope="session")
def tiny_model():
    """A random `VLVModel` with every part, in eval mode."""
    return tiny.model()


@pytest.fixture(scope="session")
def tiny_processor():
    """The `VLVProcessor` of `tiny_model`: 32x32 pixels, byte-level tokenizers."""
    return tiny.processor()


@pytest.fixture(scope="module")
def pixel_values():
    """Three images for `tiny_model`'s encoder."""
    return tiny.pixels(3)[0]


@pytest.fixture(scope="module")
def captions():
    """Three captions of different lengths, padded on the right, with their labels."""
    return tiny.processor()(text=["a cat", "two small dogs", "sky"], return_labels=True)


@pytest.fixture(scope="session")
def tiny_repo(tmp_path_factory, tiny_model, tiny_processor):
    """The folder of a complete saved VLV: `tiny_model`, `tiny_processor` and the code."""
    folder = tmp_path_factory.mktemp("repo")
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompted_repo(tmp_path_factory, tiny_model):
    """As `tiny_repo`, of a model that was trained with prompts."""
    folder = tmp_path_factory.mktemp("prompted")
    tiny_model.save_pretrained(folder)
    processor = tiny.processor()
    processor.learn_prompts({"short": "Be brief.", "words": "In {words} words."})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_components(tmp_path_factory):
    """A folder with `encoder/`, `decoder/` and `caption_head/`, the parts in their own libraries' layouts."""
    return tiny.save_components(tmp_path_factory.mktemp("components"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of 40 drawn scenes with captions."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), 40, split="train")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The package as a wheel."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel and without a checkout. `installed("vlv", "demo")` runs a program of it."""
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running Hub for the client in this process, with a token that may write and with an empty cache."""
    with running_hub() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # Xet is a separate service; without it, files go through the Hub itself
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        # transformers keeps a client, which would go on asking the Hub of an earlier test, for minutes.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()
