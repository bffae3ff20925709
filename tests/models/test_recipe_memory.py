"""What `vlv info RECIPE` counts, against sizes by hand and against a real step."""

import pytest
import teachers
import torch

from vlv.cli import main
from vlv.models.memory import recipe_config, stage1_memory
from vlv.training.recipe import find_recipe, read_recipe_file


@pytest.mark.parametrize("family", ["SD 2 (velocity)", "SD 3.5", "Sana"])
@pytest.mark.slow
def test_activations_are_those_of_a_real_step(family):
    """A step in fp32 on real tensors keeps what the estimate counts. (Lumina2 and Z-Image cannot be estimated.)"""
    config = teachers.config(family, caption_config=None)
    *_, activations = stage1_memory(config, None, 2, False, image_tokens=17)
    model = teachers.model(family, caption_config=None)
    model.set_stage("autoencode").train()
    own = {weight.untyped_storage()._cdata for weight in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    side = 32 // model.teacher.factor
    latents = torch.randn(2, model.teacher.channels[1], side, side)
    timesteps = torch.zeros(2, dtype=torch.long)
    features = torch.randn(2, 17, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(image_features=features, latents=latents, noise=torch.randn_like(latents), timesteps=timesteps)
    real = sum(storage.nbytes() for storage in kept.values())
    assert 0.8 < activations.bytes / real < 1.2


def test_a_family_that_cannot_be_estimated_says_so():
    *_, activations = stage1_memory(teachers.config("Lumina2", caption_config=None), None, 2, True)
    assert activations.bytes is None


@pytest.mark.slow
def test_noise_draws_and_muon_are_counted():
    config = teachers.config("SD 2 (velocity)", caption_config=None)
    once = {item.name: item.bytes for item in stage1_memory(config, None, 2, False, image_tokens=17)}
    config.noise_draws = 4
    drawn = {item.name: item.bytes for item in stage1_memory(config, None, 2, False, image_tokens=17, muon=True)}
    activations = [name for name in once if name.startswith("activations")][0]
    assert 1.5 * once[activations] < drawn[activations] < 4 * once[activations]  # the encoder runs once
    adamw, muon = "AdamW's two moments, fp32", "Muon's moment, fp32"
    assert drawn[adamw] + 2 * drawn[muon] == once[adamw] and drawn[muon] > 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["stage1-sdxl", "stage1-sd35-medium", "stage1-sana"])
def test_the_recipes_fit_80_gb(recipe):
    settings = read_recipe_file(find_recipe(recipe))
    batch = settings["per_device_train_batch_size"]
    held = stage1_memory(recipe_config(settings), settings["train_parts"], batch, settings["bf16"])
    assert 30e9 < sum(item.bytes for item in held) < 72e9  # the allocator and the libraries need some, too


@pytest.mark.slow
def test_the_command(capsys):
    assert main(["info", "stage1-sana"]) == 0
    output = capsys.readouterr().out
    assert "1,604," in output and "an estimate" in output and "under bf16 autocast" in output
    assert main(["info", "finetune-caption"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "Only a recipe of the stage 'autoencode' that names its encoder and decoder can be counted" in error
