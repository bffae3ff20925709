"""A trained model becomes a checkpoint of the package."""

import json

import pytest
import torch

from modeling_vlv import CODE_FILES
from vlv.models.loading import load_captioner
from vlv.tiny.bundle import RECIPES_OF, bundle


@pytest.fixture
def outputs(tmp_path, tiny_model, tiny_processor):
    """As trainings leave it: each step with its record, and the last with a whole model."""
    folder = tmp_path / "made"
    for step in {step for _, steps in RECIPES_OF.values() for step in steps}:
        tiny_model.save_pretrained(folder / step)
        tiny_processor.save_pretrained(folder / step)
        record = {"recipe": {"dataset": f"{folder}/scenes/train"}, "commit": "c0ffee"}
        (folder / step / "training.json").write_text(json.dumps(record))
        (folder / step / "checkpoint-10").mkdir()
    return folder


@pytest.mark.parametrize("name", RECIPES_OF)
def test_bundle(outputs, tmp_path, tiny_model, name):
    _, steps = RECIPES_OF[name]
    checkpoint = tmp_path / "checkpoints" / name
    checkpoint.mkdir(parents=True)
    (checkpoint / "README.md").write_text("# Mine\n")
    (checkpoint / "old.safetensors").write_text("")
    bundle(outputs, checkpoint)
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
    checkpoint = tmp_path / "vlv-tiny"
    checkpoint.mkdir()
    with pytest.raises(FileNotFoundError, match="teacher holds no finished training: run `make tiny` first"):
        bundle(outputs, checkpoint)
    assert checkpoint.exists()
