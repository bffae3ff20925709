"""transformers' own Trainer, as in the README."""

import re

import pytest
import tiny
import torch
from datasets import load_dataset
from paths import ROOT
from transformers import Trainer, TrainingArguments

from vlv import VLVForConditionalGeneration, VLVModel, VLVProcessor, bundled_checkpoint

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def dataset(scenes):
    return load_dataset("imagefolder", data_dir=str(scenes), split="train").select(range(8))


@pytest.mark.slow
def test_the_readmes_example_trains_stage_2(scenes, tmp_path, monkeypatch):
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Trainer(" in code)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_images").symlink_to(scenes)
    exec(example.replace("max_steps=10", "max_steps=1"), {})

    before = dict(VLVModel.from_pretrained(bundled_checkpoint()).named_parameters())
    trained = VLVModel.from_pretrained("stage2/final")
    changed = {name.split(".")[0] for name, p in trained.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"prefix_projection", "caption_head"}
    assert VLVProcessor.from_pretrained("stage2/final").tokenizer


def test_training_counts_the_tokens_that_evaluation_counts(tiny_processor, dataset, tmp_path):
    def collate(rows):
        images, text = ([row[name] for row in rows] for name in ("image", "text"))
        return tiny_processor(images=images, text=text, return_labels=True)

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        learning_rate=0,
        logging_steps=1,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
    )
    model = tiny.model(VLVForConditionalGeneration).set_stage("caption")
    trainer = Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset, data_collator=collate)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)
