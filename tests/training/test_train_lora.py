"""LoRA in stage 2: what it trains, what it saves, and merging and loading the adapters."""

import json
from shutil import rmtree

import pytest
import torch
from peft import PeftModel
from running_train import arguments, losses, run

from modeling_vlv import VLVForConditionalGeneration, VLVModel
from vlv.cli import main as vlv
from vlv.training.lora import target_layers

RECIPE = "tiny/caption"
LORA = {"lora_rank": 4, "lora_alpha": 32, "learning_rate": 0.01, "save_dtype": "float32"}


def logits(model, processor):
    inputs = processor(text=["a cat", "two small dogs"])
    embeds = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(caption_embeds=embeds, **inputs).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_repo, scenes):
    """The output folders of one training: with adapters beside the base model, and with merged adapters."""
    folder = tmp_path_factory.mktemp("lora")
    for merge in (False, True):
        run(
            RECIPE,
            folder / str(merge),
            dataset=scenes,
            model=tiny_repo,
            merge_lora=merge,
            train_parts=["prefix_projection", "caption_head", "language_model"],
            gradient_checkpointing_parts=["encoder", "caption_head"],
            **LORA,
        )
    return {"adapters": folder / "False", "merged": folder / "True"}


@pytest.mark.slow
def test_adapters_and_the_merged_model_give_the_same(trained, tiny_repo, tiny_processor):
    base = VLVModel.from_pretrained(tiny_repo)
    before = logits(base, tiny_processor)
    expected = logits(VLVModel.from_pretrained(trained["merged"]), tiny_processor)
    assert (expected - before).abs().max() > 0.1

    through_peft = logits(PeftModel.from_pretrained(base, trained["adapters"]), tiny_processor)
    torch.testing.assert_close(through_peft, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [VLVModel, VLVForConditionalGeneration])
def test_loading_the_folder_loads_the_adapters(model_class, trained, tiny_processor):
    expected = logits(VLVModel.from_pretrained(trained["merged"]), tiny_processor)
    actual = logits(model_class.from_pretrained(trained["adapters"]), tiny_processor)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_adapters_are_in_the_layers_of_both_language_models(trained):
    config = json.loads((trained["adapters"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None  # not the local folder of the base model
    assert config["r"] == 4 and config["modules_to_save"] == ["prefix_projection"]
    targets = config["target_modules"]
    assert {name.rpartition(".")[2] for name in targets} == {"q_proj", "v_proj"}
    assert {name.split(".layers.")[0] for name in targets} == {
        "caption_head.model",
        "encoder.language_model.encoder",
        "encoder.language_model.decoder",
    }
    assert not (trained["merged"] / "adapter_config.json").exists()


@pytest.mark.slow
def test_resuming_gives_the_losses_of_an_uninterrupted_run(tiny_repo, scenes, tmp_path):
    settings = {"dataset": scenes, "model": tiny_repo, "lora_dropout": 0.1, "save_total_limit": 3, **LORA}
    unbroken = losses(run(RECIPE, tmp_path, **settings))
    rmtree(tmp_path / "checkpoint-4")
    record = run(RECIPE, tmp_path, resume=True, **settings)
    assert record["resumed_from"] == "checkpoint-2"
    assert losses(record) == pytest.approx(unbroken, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_parts": ["queries", "caption_head"]}, "not queries"),
        ({"train_parts": ["prefix_projection"]}, "names neither caption_head nor language_model"),
        ({"lora_targets": ["up", "down"]}, "lora_targets up, down: there are no such layers in the caption_head"),
    ],
)
def test_settings_that_adapters_cannot_use_are_refused(settings, message, tiny_repo, scenes, tmp_path, capsys):
    argv = arguments(RECIPE, tmp_path, dataset=scenes, model=tiny_repo, lora_rank=4, **settings)
    assert vlv(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"lora_alpha": 32, "lora_targets": "all-linear"}, "lora_alpha, lora_targets"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"merge_lora": True}, "merge_lora"),
    ],
)
def test_settings_of_adapters_without_adapters_are_refused(settings, names, tiny_repo, scenes, tmp_path, capsys):
    assert vlv(["train", *arguments(RECIPE, tmp_path, dataset=scenes, model=tiny_repo, **settings)]) == 2
    error = capsys.readouterr().err
    assert f"error: {names}: there are no adapters without lora_rank" in error and "Traceback" not in error


def test_all_linear_layers_but_the_output_embeddings(tiny_model):
    names = target_layers(tiny_model, "caption_head", ["all-linear"])
    layer = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted({name.rpartition(".")[2] for name in names}) == layer
    assert len(names) == 2 * len(layer)
