"""Fixtures that the tests share. What a session fixture gives is for reading: a test that changes it takes a copy."""

import os

# Before any library reads them: no test may reach for the Hub, and workers must not fight over the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import tiny
import torch
from transformers.utils import logging

logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    """A `VLVConfig` whose every part is tiny."""
    return tiny.config()


@pytest.fixture(scope="session")
def tiny_model():
    """A random `VLVModel` with every part, in eval mode."""
    return tiny.model()


@pytest.fixture(scope="session")
def tiny_processor():
    """The `VLVProcessor` of `tiny_model`: 32x32 pixels, byte-level tokenizers."""
    return tiny.processor()


@pytest.fixture(scope="session")
def tiny_repo(tmp_path_factory, tiny_model, tiny_processor):
    """The folder of a complete saved VLV: `tiny_model`, `tiny_processor` and the code."""
    folder = tmp_path_factory.mktemp("repo")
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_components(tmp_path_factory):
    """A folder with `encoder/`, `decoder/` and `caption_head/`, the parts in their own libraries' layouts."""
    return tiny.save_components(tmp_path_factory.mktemp("components"))
