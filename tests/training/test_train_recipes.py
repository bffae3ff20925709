"""The recipes of the package, read by the real parser and by accelerate."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from paths import ROOT

import vlv
from vlv.tiny.bundle import RECIPES_OF
from vlv.training.recipe import changed_arguments, read_recipe

TRAINING = ROOT / "vlv" / "training"
RECIPES, ACCELERATE = TRAINING / "recipes", TRAINING / "accelerate"


def read(name, *argv):
    _, settings, args = read_recipe([str(RECIPES / name), "--output_dir", "out", *argv])
    return settings, args


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read(recipe):
    if recipe.parent.name != "accelerate":
        read(recipe.relative_to(RECIPES))


def test_paper_stage_1_is_the_published_recipe():
    settings, args = read("paper-stage1.yaml")
    assert (settings.stage, settings.model) == ("autoencode", None)
    assert settings.encoder.endswith("Florence-2-large") and settings.decoder.endswith("stable-diffusion-2-1-base")
    assert set(settings.train_parts) == {"queries", "projection", "language_model"}
    assert (settings.image_size, settings.crop, settings.denoising_loss) == (384, "center", "mse")
    assert settings.sample_latents and settings.min_snr_gamma is None and settings.context_dropout == 0
    assert settings.gradient_checkpointing_parts == ["unet"]
    assert args.optim.startswith("adamw")
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.weight_decay) == (5e-5, 0.9, 0.99, 0.01)
    assert (args.max_grad_norm, args.lr_scheduler_type, args.warmup_steps) == (1.0, "cosine", 0)
    assert (8 * args.per_device_train_batch_size * args.gradient_accumulation_steps, args.max_steps) == (512, 200_000)
    assert not args.bf16 and not args.fp16
    zero = load_config_from_file(str(ACCELERATE / "deepspeed_zero2.yaml"))
    assert (zero.num_processes, zero.deepspeed_config["zero_stage"]) == (8, 2)


def test_paper_stage_2_is_the_published_recipe():
    settings, args = read("paper-stage2.yaml", "--model", "stage1")
    assert (settings.stage, settings.caption_head) == ("caption", "Qwen/Qwen2.5-3B")
    assert set(settings.train_parts) == {"prefix_projection", "caption_head", "language_model"}
    assert settings.lora_rank is None and settings.max_length == 300
    assert settings.dataset == "ccvl/LAION-High-Qualtiy-Pro-6M-VLV"
    assert args.optim.startswith("adamw")
    assert (args.learning_rate, args.lr_scheduler_type, args.warmup_steps) == (1e-5, "linear", 0)
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert 20_000 <= args.max_steps <= 100_000
    assert args.bf16


def test_our_recipes_draw_as_many_samples_as_the_papers_for_the_operations_that_are_counted():
    """Each is a row of the table in docs/speed.md, and both together cost less than 250 dollars by it."""
    record = json.loads((ROOT / "benchmarks" / "results" / "flops.json").read_text())
    assert (record["caption_head"], record["price"], record["utilisation"]) == ("3B", 2.5, 0.4)
    first, args = read("stage1.yaml")
    assert (first.image_size, first.encoder_learning_rate) == (384, 5e-5) and args.bf16
    on_each = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert 4 * on_each * first.noise_draws * args.max_steps == 512 * 200_000
    ways = record["operations"]["stage 1"]
    counted = ("encoder_size", "noise_draws", "cached", "checkpointing", "muon_batch")
    settings = (first.encoder_image_size, first.noise_draws, False, bool(first.gradient_checkpointing_parts), on_each)
    (one,) = (way for way in ways if [way[name] for name in counted] == [*settings] and way["num_queries"] is None)

    second, args = read("stage2.yaml", "--model", "stage1")
    assert 8 * args.per_device_train_batch_size * args.max_steps == 64 * 100_000
    assert set(second.train_parts) == {"prefix_projection", "caption_head"} and second.lora_rank is None
    assert args.train_sampling_strategy == "group_by_length"
    counted = ("encoder_size", "trains_encoder", "cached", "lora", "tokens")
    settings = [first.encoder_image_size, False, False, False, record["tokens"]]
    (two,) = (way for way in record["operations"]["stage 2"] if [way[name] for name in counted] == settings)
    assert one["dollars"] + two["dollars"] < 250
    papers = sum(record["operations"][stage][0]["dollars"] for stage in ("stage 1", "stage 2"))
    assert papers > 3 * (one["dollars"] + two["dollars"])


def test_fine_tuning_starts_from_the_bundled_checkpoint_wherever_it_is_run(tmp_path, monkeypatch, scenes):
    monkeypatch.chdir(tmp_path)
    argv = [str(RECIPES / "finetune-caption.yaml"), "--output_dir", "out", "--dataset", str(scenes)]
    stage_type, settings, args = read_recipe(argv)
    assert stage_type(settings, args).source == vlv.bundled_checkpoint()
    _, settings, _ = read_recipe([*argv, "--model", "another"])
    assert settings.model == "another"


@pytest.mark.parametrize(
    ("checkpoint", "step"), [(name, step) for name, (_, steps) in RECIPES_OF.items() for step in steps]
)
def test_the_bundled_checkpoints_record_these_recipes(checkpoint, step):
    folder = Path(vlv.bundled_checkpoint(checkpoint)) / "training" / step
    recipe = RECIPES / RECIPES_OF[checkpoint][0] / f"{step}.yaml"
    settings_then, settings_now = (yaml.safe_load(file.read_text()) for file in (folder / "recipe.yaml", recipe))
    if checkpoint == "vlv-tiny":
        settings_now.pop("world", None)  # there was one drawn world when it was trained
    assert settings_then == settings_now
    record = json.loads((folder / "training.json").read_text())
    settings, args = read(recipe.relative_to(RECIPES))
    expected = {**vars(settings), **changed_arguments(args)}
    for key in settings_now:
        assert record["recipe"].get(key) == expected.get(key), key
    assert record["seed"] == args.seed and re.fullmatch("[0-9a-f]{40}", record["commit"])
    logged = [row for row in record["log"] if "loss" in row]
    assert logged[-1]["step"] == record["steps"] == args.max_steps
    # The denoising loss has a floor, which is the teacher's own: stage 1 of vlv-emoji cannot halve it.
    stage_1_of_emoji = checkpoint == "vlv-emoji" and step in ("autoencode", "details")
    assert logged[-1]["loss"] < logged[0]["loss"] / (1 if stage_1_of_emoji else 2)


# ---- accelerate ------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(monkeypatch):
    """Runs `accelerate launch` with one of the files, without starting processes. Returns its arguments."""
    launched = []
    for launcher in ("multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(f"accelerate.commands.launch.{launcher}", launched.append)

    def launch(name):
        file = str(ACCELERATE / f"{name}.yaml")
        argv = ["--config_file", file, "--main_process_port", "0", "-m", "vlv.train", "RECIPE.yaml"]
        launch_command(launch_command_parser().parse_args(argv))
        return launched.pop()

    return launch


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("deepspeed_zero2", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_knows_every_key(name, kind, launch):
    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))  # raises for keys that it does not know
    assert config.distributed_type == kind and config.num_processes == 8
    assert config.mixed_precision == "no"  # so the recipe sets the precision
    args = launch(name)
    for group in ("fsdp_config", "deepspeed_config"):
        for key in yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text()).get(group, {}):
            assert hasattr(args, key), key


def test_fsdp2_as_launched(launch):
    environment = prepare_multi_gpu_env(launch("fsdp2"))
    with patch_environment(**{k: v for k, v in environment.items() if k.startswith(("FSDP_", "ACCELERATE_"))}):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.cpu_ram_efficient_loading


def test_zero2_as_launched(launch):
    _, environment = prepare_deepspeed_cmd_env(launch("deepspeed_zero2"))
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert environment["ACCELERATE_GRADIENT_CLIPPING"] == "1.0"
