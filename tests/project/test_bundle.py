"""A trained model becomes a checkpoint of the package."""

import json

import pytest
import torch

from modeling_vlv import CODE_FILES
from vlv.models.loading import load_captioner
from vlv.tiny.bundle import PROMPTS, STEPS, bundle


@pytest.fixture
def outputs(tmp_path, tiny_model, tiny_processor):
    """As trainings leave it: each step with its record, and the last with a whole model."""
    folder = tmp_path / "made"
    for step in (*STEPS, *PROMPTS):
        tiny_model.save_pretrained(folder / step)
        tiny_processor.save_pretrained(folder / step)
        record = {"recipe": {"dataset": f"{folder}/scenes/train"}, "commit": "c0ffee"}
        (folder / step / "training.json").write_text(json.dumps(record))
        (folder / step / "checkpoint-10").mkdir()
    return folder


@pytest.mark.parametrize("steps", [PROMPTS, STEPS])
def test_bundle(outputs, tmp_path, tiny_model, steps):
    checkpoint = tmp_path / "checkpoints" / "vlv-new"
    checkpoint.mkdir(parents=True)
    (checkpoint / "README.md").write_text("# Mine\n")
    (checkpoint / "old.safetensors").write_text("")
    bundle(outputs, checkpoint, "tiny", steps)
    captioner, processor = load_captioner(str(checkpoint), "cpu")
    for name, weight in captioner.caption_head.named_parameters():
        assert torch.equal(weight, tiny_model.caption_head.get_parameter(name)), name
    assert processor.tokenizer is not None
    assert (checkpoint / "README.md").read_text() == "# Mine\n"
    assert {file.name for file in checkpoint.glob("*.py") if file.is_symlink()} == set(CODE_FILES)
    assert not (checkpoint / "checkpoint-10").exists() and not (checkpoint / "old.safetensors").exists()
    assert {folder.name for folder in (checkpoint / "training").iterdir()} == set(steps)
    for step in steps:
        record = json.loads((checkpoint / "training" / step / "training.json").read_text())
        assert record == {"recipe": {"dataset": "outputs/scenes/train"}, "commit": "c0ffee"}
        assert (checkpoint / "training" / step / "recipe.yaml").is_file()


def test_an_unfinished_training_is_not_bundled(outputs, tmp_path):
    (outputs / "teacher" / "training.json").unlink()
    (tmp_path / "kept").mkdir()
    with pytest.raises(FileNotFoundError, match="teacher holds no finished training: run `make tiny` first"):
        bundle(outputs, tmp_path / "kept", "tiny")
    assert (tmp_path / "kept").exists()
