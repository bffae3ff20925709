"""The released captioner in one command: over HTTP, from a repo as others publish it, with the published parts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import WRITE_TOKEN
from safetensors.torch import load_file, save_file

from modeling_vlv import VLVForConditionalGeneration
from processing_vlv import VLVProcessor
from vlv.cli import main
from vlv.models import published
from vlv.models.convert import map_tensors
from vlv.models.published import PARTS, published_config, published_part
from vlv.models.reference import is_reference

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
IMAGES = [PARITY / "images" / name for name in ("a_120x90.png", "b_77x131.png")]
# The repo of another class, whose code transformers would ask to run.
THEIR_CONFIG = {
    "architectures": ["VLV_MODEL"],
    "auto_map": {"AutoConfig": "configuration.Config", "AutoModel": "modeling.VLV_MODEL"},
    "model_type": "VLV_decoder",
}


@pytest.fixture(scope="module")
def tensors():
    return torch.load(PARITY / "stage2" / "step_3" / "model.pt", weights_only=True)


@pytest.fixture(scope="module")
def released(tmp_path_factory, tensors):
    """The folder of a stage-2 checkpoint as it is released: shards, a config.json of its own, a tokenizer."""
    folder = tmp_path_factory.mktemp("released")
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name].clone().contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(THEIR_CONFIG))
    for file in (PARITY / "stage2" / "step_3").glob("*.*"):
        if file.suffix != ".pt":
            shutil.copyfile(file, folder / file.name)
    (folder / "training_state.bin").write_bytes(b"not wanted")
    return folder


@pytest.fixture
def repos(hub, released):
    """The Hub with the released captioner and the parts that it began with."""
    hub.publish("ada/captioner", released)
    for name in ("florence", "sd", "qwen"):
        hub.publish(f"ada/{name}", PARITY / "components" / name)
    return hub


@pytest.fixture
def tiny_parts(monkeypatch):
    """The published parts, at the widths of the tiny checkpoint."""
    parts = {"encoder": {64: "ada/florence"}, "decoder": {64: "ada/sd"}, "caption_head": {96: "ada/qwen"}}
    monkeypatch.setattr(published, "PARTS", parts)


def is_the_model(folder, tensors):
    """Whether every weight in a folder is the checkpoint's, and the captions are those that the paper's code wrote."""
    model, processor = VLVForConditionalGeneration.from_pretrained(folder), VLVProcessor.from_pretrained(folder)
    weights = model.state_dict()
    for name, weight in map_tensors(tensors)[0].items():
        assert torch.equal(weights[name], weight), name
    ids = model.generate(**processor(images=IMAGES), max_new_tokens=16)
    assert torch.equal(ids, load_file(PARITY / "stage2_expected.safetensors")["gen.greedy.ids"])
    assert processor.clean_captions and model.generation_config.sentence_end_ids
    assert model.generation_config.max_new_tokens == 300
    return True


@pytest.mark.slow
def test_in_one_command(repos, tiny_parts, tensors, tmp_path, capsys):
    assert main(["convert", "ada/captioner", "--image_size", "64", "--output", str(tmp_path / "vlv")]) == 0
    said = capsys.readouterr().out
    for part, source in (("encoder", "ada/florence"), ("decoder", "ada/sd"), ("caption_head", "ada/qwen")):
        assert f"{part:12} {source}" in said
    assert "from ada/sd/unet" in said and "left over  0" in said
    assert is_the_model(tmp_path / "vlv", tensors)
    assert json.loads((tmp_path / "vlv" / "config.json").read_text())["decoder_config"]["unet"]
    cached = {path.name for path in (tmp_path / "cache" / "models--ada--captioner").rglob("*")}
    assert "training_state.bin" not in cached and "model-00001-of-00002.safetensors" in cached


@pytest.mark.slow
def test_a_command_of_its_own_with_named_parts(repos, released, tensors, tmp_path):
    """A process without a terminal: nothing may ask whether to run the repo's code."""
    environment = {**os.environ, "HF_ENDPOINT": repos.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITE_TOKEN}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_CACHE", None)
    parts = ["--encoder", "ada/florence", "--decoder", "ada/sd", "--caption_head", "ada/qwen", "--image_size", "64"]
    ran = subprocess.run(
        [sys.executable, "-m", "vlv", "convert", "ada/captioner", *parts, "--output", str(tmp_path / "vlv")],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert "began with these published parts" not in ran.stdout
    assert "custom code" not in ran.stderr
    assert is_the_model(tmp_path / "vlv", tensors)


def test_the_published_parts_are_of_the_published_sizes():
    for size, name in (("0.5B", "Qwen/Qwen2.5-0.5B"), ("1.5B", "Qwen/Qwen2.5-1.5B"), ("3B", "Qwen/Qwen2.5-3B")):
        config = published_config(size)
        assert published_part("caption_head", config.caption_config.hidden_size) == name
        assert published_part("encoder", config.encoder_config.text_config.d_model) in PARTS["encoder"].values()
        assert published_part("decoder", config.text_encoder_config.hidden_size) in PARTS["decoder"].values()


# ---- what is refused ---------------------------------------------------------------------------------------


def refused(capsys, tmp_path, checkpoint, complaint, *options):
    assert main(["convert", checkpoint, *options, "--output", str(tmp_path / "out" / "vlv")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vlv convert: error: ") and complaint in error, error
    assert not (tmp_path / "out" / "vlv").exists()


def test_another_size_than_the_published_ones(released, tmp_path, capsys):
    refused(
        capsys, tmp_path, str(released), "encoder is 64 wide, and the published one 1024: name the one that it was"
    )
    options = ["--encoder", "e", "--decoder", "d"]
    refused(capsys, tmp_path, str(released), "caption head is 96 wide, and the published one 896 or 1536 or", *options)


def test_a_caption_head_of_another_width(released, tmp_path, capsys):
    folder = tmp_path / "qwen"
    shutil.copytree(PARITY / "components" / "qwen", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64, "intermediate_size": 128}))
    encoder, decoder = (str(PARITY / "components" / name) for name in ("florence", "sd"))
    options = ["--encoder", encoder, "--decoder", decoder, "--caption_head", str(folder)]
    refused(capsys, tmp_path, str(released), "does not fit --caption_head: ", *options)


def test_a_repo_of_another_model_is_not_downloaded(hub, tmp_path, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    hub.publish("ada/other", folder)
    complaint = (
        "ada/other is not a checkpoint of the paper's code: it has no query_embed, but model.embed_tokens.weight"
    )
    refused(capsys, tmp_path, "ada/other", complaint)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.publish("ada/nothing", tmp_path / "empty")
    refused(capsys, tmp_path, "ada/nothing", "ada/nothing holds no checkpoint: none of model.safetensors.index.json")
    refused(capsys, tmp_path, "ada/missing", "no model of that name was found on the Hub")


def test_a_vlv_needs_no_conversion(hub, tiny_repo, tmp_path, capsys):
    hub.publish("ada/vlv", tiny_repo)
    for source in ("ada/vlv", str(tiny_repo)):
        refused(capsys, tmp_path, source, f"{source} is a VLV already: there is nothing to convert.")


def test_a_shard_that_is_missing_or_cut_short(hub, released, tmp_path, capsys):
    folder = tmp_path / "broken"
    shutil.copytree(released, folder)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    hub.publish("ada/short", folder)
    refused(capsys, tmp_path, "ada/short", "model-00002-of-00002.safetensors is damaged or cut short")
    shard.unlink()
    hub.publish("ada/missing", folder)
    refused(capsys, tmp_path, "ada/missing", "names model-00002-of-00002.safetensors, but there is no such file")


# ---- commands that are given such a checkpoint -------------------------------------------------------------

COMMANDS = {
    "caption": ["caption", str(IMAGES[0]), "--model", "MODEL"],
    "reconstruct": ["reconstruct", str(IMAGES[0]), "--model", "MODEL", "--output", "OUT"],
    "info": ["info", "MODEL"],
    "export": ["export", "MODEL", "--output", "OUT"],
    "evaluate": ["evaluate", "--model", "MODEL", "--output", "OUT.json"],
    "publish": ["publish", "MODEL", "--repo-id", "ada/mine", "--license", "mit"],
    "train": [
        "train",
        "finetune-caption",
        "--model",
        "MODEL",
        "--dataset",
        str(PARITY / "images"),
        "--output_dir",
        "OUT",
    ],
    "demo": ["demo", "--model", "MODEL", "--output", "OUT"],
    "app": ["app", "--model", "MODEL"],
    "serve": ["serve", "--model", "MODEL"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_any_command_says_how_to_convert_it(command, released, tmp_path, capsys):
    argv = [str(tmp_path / "out") if word == "OUT" else word for word in COMMANDS[command]]
    assert main([str(released) if word == "MODEL" else word for word in argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    sentence = f"{released} is a checkpoint of the paper's code: bring it over with `vlv convert {released} --output "
    assert sentence in error, error


def test_on_the_hub_too_without_downloading_it(repos, tmp_path, capsys):
    assert main(["caption", str(IMAGES[0]), "--model", "ada/captioner"]) == 2
    assert "ada/captioner is a checkpoint of the paper's code: bring it over" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_files_of_either_stage_are_recognised(tmp_path, tiny_repo):
    assert is_reference(str(PARITY / "stage2" / "step_3"))
    assert is_reference(str(PARITY / "stage2" / "step_3" / "model.pt"))
    assert is_reference(str(PARITY / "stage1_flat" / "pytorch_model.bin"))
    for other in (tiny_repo, PARITY / "components" / "qwen", tmp_path, IMAGES[0], "nobody/nothing"):
        assert not is_reference(str(other))
