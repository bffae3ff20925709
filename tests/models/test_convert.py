"""`vlv convert`: every layout of the paper's checkpoints gives the same model. Others are refused in a sentence."""

import json
import os
import pickle
import shutil
from pathlib import Path

import big
import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from modeling_vlv import VLVForConditionalGeneration, VLVModel
from processing_vlv import VLVProcessor
from vlv.cli import main
from vlv.models.convert import convert_checkpoint, map_tensors, read_checkpoint
from vlv.models.loading import load_captioner

PARITY = FIXTURES / "parity"
FLORENCE, SD, QWEN = (str(PARITY / "components" / name) for name in ("florence", "sd", "qwen"))
STAGE1, STAGE2 = PARITY / "stage1_flat" / "pytorch_model.bin", PARITY / "stage2" / "step_3" / "model.pt"


@pytest.fixture(scope="module")
def tensors1():
    return torch.load(STAGE1, weights_only=True)


@pytest.fixture(scope="module")
def tensors2():
    return torch.load(STAGE2, weights_only=True)


@pytest.fixture(scope="module")
def text_encoder_only(tmp_path_factory):
    """A Stable Diffusion folder that has only the text encoder."""
    folder = tmp_path_factory.mktemp("text_encoder")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(Path(SD) / name, folder / name)
    return str(folder)


def clone(tensors):
    """The tensors without shared storage, which safetensors would refuse."""
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def write_shards(tensors, folder, save, stem, suffix):
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{number}-of-00002{suffix}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- layouts -----------------------------------------------------------------------------------------------


def flat(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def old_torch_format(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def parallel(tensors, folder):
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, folder / "model.pt")
    return folder


def wrapped(tensors, folder):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    states = {"optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": {"last_epoch": 3}}
    torch.save({"step": 3, "model_state_dict": tensors, **states}, folder / "checkpoint_3.pt")
    return folder / "checkpoint_3.pt"


def wrapped_and_parallel(tensors, folder):
    return wrapped({f"module.{name}": tensor for name, tensor in tensors.items()}, folder)


def sharded(tensors, folder):
    write_shards(tensors, folder, torch.save, "pytorch_model", ".bin")
    return folder


def safetensors(tensors, folder):
    save_file(clone(tensors), folder / "model.safetensors")
    return folder / "model.safetensors"


def sharded_safetensors(tensors, folder):
    write_shards(clone(tensors), folder, save_file, "model", ".safetensors")
    return folder / "model.safetensors.index.json"


def tied_tensors_once(tensors, folder):
    """As safetensors saves a model: with only one name of each group of tied tensors, here the last one."""
    prefix = "VLV_model." if "VLV_model.query_embed" in tensors else ""
    left_out = {f"{prefix}model.language_model.model.{name}.weight" for name in ("shared", "encoder.embed_tokens")}
    left_out.add("qwen2_model.model.embed_tokens.weight")
    return safetensors({name: tensor for name, tensor in tensors.items() if name not in left_out}, folder)


LAYOUTS = [
    flat,
    old_torch_format,
    parallel,
    wrapped,
    wrapped_and_parallel,
    sharded,
    safetensors,
    sharded_safetensors,
    tied_tensors_once,
]


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        *((2, layout) for layout in LAYOUTS),
        (1, flat),
        *(pytest.param(1, layout, marks=pytest.mark.slow) for layout in LAYOUTS if layout is not flat),
    ],
)
def test_every_layout_gives_the_same_tensors(stage, layout, tensors1, tensors2, tmp_path, text_encoder_only):
    tensors = {1: tensors1, 2: tensors2}[stage]
    parts = (FLORENCE, SD) if stage == 1 else (FLORENCE, text_encoder_only, QWEN)
    model, _, report = convert_checkpoint(str(layout(tensors, tmp_path)), *parts, image_size=64)
    expected, _ = map_tensors(tensors)
    weights = model.state_dict()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    assert report.stage == stage and not report.left_over
    read, _ = read_checkpoint(str(layout(tensors, tmp_path)))
    assert sorted([*report.mapped, *report.tied, *report.dropped]) == sorted(read)
    assert len(report.dropped) == 2


def test_the_whole_report(tensors2, text_encoder_only):
    model, _, report = convert_checkpoint(str(STAGE2), FLORENCE, text_encoder_only, QWEN, 64)
    assert len(tensors2) == len(report.mapped) + len(report.tied) + len(report.dropped) == 349
    assert set(report.tied.values()) == {
        "encoder.language_model.shared.weight",
        "caption_head.model.embed_tokens.weight",
    }
    assert report.mapped["VLV_model.model.image_projection"] == "encoder.multi_modal_projector.image_projection.weight"
    assert set(report.mapped.values()) <= set(model.state_dict())
    assert "left over  0" in str(report) and "lm_head" in str(report)


@pytest.mark.slow
def test_the_decoder_of_stage_2_is_the_given_one(tmp_path):
    model, _, report = convert_checkpoint(str(STAGE2), FLORENCE, SD, QWEN, 64)
    expected = VLVModel.from_components(*parts_with_weights(tmp_path))
    for name in ("unet", "vae"):
        theirs = getattr(expected, name).state_dict()
        for key, weight in getattr(model, name).state_dict().items():
            assert torch.equal(weight, theirs[key]), f"{name}.{key}"
    assert sum(report.added.values()) == 440 + 180
    assert model.config.decoder_config["scheduler"]["prediction_type"] == "epsilon"
    assert model.config.image_size == 64


def parts_with_weights(folder):
    shutil.copytree(FLORENCE, folder / "florence")
    tensors = torch.load(STAGE1, weights_only=True)
    florence = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    torch.save(florence, folder / "florence" / "pytorch_model.bin")
    return str(folder / "florence"), SD


def test_a_captioner_without_decoder(text_encoder_only, expected_ids):
    model, processor, _ = convert_checkpoint(str(STAGE2), FLORENCE, text_encoder_only, QWEN, 64)
    assert model.unet is None and model.config.decoder_config is None
    images = [PARITY / "images" / name for name in ("a_120x90.png", "b_77x131.png")]
    ids = model.generate(processor(images=images)["pixel_values"], max_new_tokens=16)
    assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize("width, heads, act", [(768, 12, "quick_gelu"), (1024, 16, "gelu")], ids=["SD 1", "SD 2"])
@pytest.mark.slow
def test_a_captioner_without_any_decoder(width, heads, act, tensors2, tmp_path):
    """The config of a text encoder with a released width is known without its folder."""
    sizes = {"vocab_size": 92, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 1}
    clip = CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=heads, hidden_act=act)).eval()
    text_encoder = getattr(clip, "text_model", clip).state_dict()
    tensors = {name: tensor for name, tensor in tensors2.items() if ".text_encoder." not in name}
    tensors |= {f"VLV_model.text_encoder.text_model.{name}": tensor for name, tensor in text_encoder.items()}
    for layer, shape in (("language_proj.0", (width, 64)), ("language_proj.2", (width, width))):
        tensors[f"VLV_model.{layer}.weight"], tensors[f"VLV_model.{layer}.bias"] = (
            torch.randn(shape),
            torch.zeros(width),
        )
    tensors["mlp.layers.0.weight"] = torch.randn(96, width)
    model, processor, _ = convert_checkpoint(str(flat(tensors, tmp_path)), FLORENCE, "none", QWEN, 64)
    ids = torch.arange(77)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.text_encoder(ids), clip(ids).last_hidden_state)
    assert processor.decoder_tokenizer is None
    inputs = processor(images=PARITY / "images" / "a_120x90.png")
    assert model.generate(**inputs, max_new_tokens=2).shape == (1, 2)
    model.save_pretrained(tmp_path / "vlv")
    processor.save_pretrained(tmp_path / "vlv")
    model, processor = load_captioner(str(tmp_path / "vlv"), "cpu")
    assert processor.tokenizer("red").input_ids


@pytest.mark.slow
def test_ids(hub, tmp_path, expected_ids):
    """The checkpoint and the parts by their names on the Hub."""
    places = {"checkpoint": STAGE2.parent, "florence": FLORENCE, "sd": SD, "qwen": QWEN}
    for name, folder in places.items():
        hub.publish(f"ada/{name}", Path(folder))
    model, processor, _ = convert_checkpoint(*(f"ada/{name}" for name in places), image_size=64)
    images = [PARITY / "images" / name for name in ("a_120x90.png", "b_77x131.png")]
    assert torch.equal(model.generate(**processor(images=images), max_new_tokens=16), expected_ids)
    assert model.config.caption_config._name_or_path == "ada/qwen"


@pytest.fixture
def expected_ids():
    return load_file(PARITY / "stage2_expected.safetensors")["gen.greedy.ids"]


# ---- settings that only the checkpoint has -----------------------------------------------------------------


def test_sizes_come_from_the_checkpoint(tensors2, tmp_path, text_encoder_only):
    """The checkpoint has other numbers of queries and positions than the parts' configs, and a longer vocabulary."""
    tensors = dict(tensors2)
    tensors["VLV_model.query_embed"] = tensors["VLV_model.query_embed"][:, :40]
    for half in ("encoder", "decoder"):
        name = f"VLV_model.model.language_model.model.{half}.embed_positions.weight"
        tensors[name] = torch.cat([tensors[name], tensors[name][:70]])
    for name in ("qwen2_model.model.embed_tokens.weight", "qwen2_model.lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    model, _, _ = convert_checkpoint(str(flat(tensors, tmp_path)), FLORENCE, text_encoder_only, QWEN, 64)
    assert model.config.num_queries == 40
    assert model.config.encoder_config.text_config.max_position_embeddings == 198
    assert model.config.caption_config.vocab_size == 408
    assert model.encode(torch.zeros(1, 3, 96, 96)).shape == (1, 40, 64)


def test_untied(tensors2, tmp_path, text_encoder_only):
    """A language head that is not tied to the embeddings stays untied, whatever its config says."""
    tensors = {**tensors2, "qwen2_model.lm_head.weight": tensors2["qwen2_model.lm_head.weight"] + 1}
    model, _, report = convert_checkpoint(str(flat(tensors, tmp_path)), FLORENCE, text_encoder_only, QWEN, 64)
    model.save_pretrained(tmp_path / "vlv")
    model = VLVForConditionalGeneration.from_pretrained(tmp_path / "vlv")
    assert torch.equal(model.caption_head.lm_head.weight, tensors["qwen2_model.lm_head.weight"])
    assert torch.equal(model.caption_head.model.embed_tokens.weight, tensors["qwen2_model.model.embed_tokens.weight"])
    assert "qwen2_model.lm_head.weight" in report.mapped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype, tensors2, tmp_path, text_encoder_only):
    tensors = {name: tensor.to(dtype) for name, tensor in tensors2.items()}
    model, _, _ = convert_checkpoint(str(flat(tensors, tmp_path)), FLORENCE, text_encoder_only, QWEN, 64)
    expected, _ = map_tensors(tensors)
    assert model.dtype == dtype and model.config.dtype == dtype
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_mixed_dtypes_keep_every_weight_exact(tensors2, tmp_path, text_encoder_only):
    tensors = {name: t.bfloat16() if name.startswith("qwen2") else t for name, t in tensors2.items()}
    model, _, _ = convert_checkpoint(str(flat(tensors, tmp_path)), FLORENCE, text_encoder_only, QWEN, 64)
    assert model.dtype == torch.float32


# ---- the command -------------------------------------------------------------------------------------------


def convert(checkpoint, output, *, encoder=FLORENCE, decoder=SD, caption_head=None):
    argv = ["convert", str(checkpoint), "--encoder", encoder, "--image-size", "64", "--output", str(output)]
    for option, value in (("--decoder", decoder), ("--caption-head", caption_head)):
        argv += [option, value] if value else []
    return main(argv)


def test_the_command_writes_a_complete_repo(tmp_path, capsys, tensors1):
    assert convert(STAGE1, tmp_path / "vlv") == 0
    assert "mapped     934" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["vlv"]
    model, processor = VLVModel.from_pretrained(tmp_path / "vlv"), VLVProcessor.from_pretrained(tmp_path / "vlv")
    weights = model.state_dict()
    for name, weight in map_tensors(tensors1)[0].items():
        assert torch.equal(weights[name], weight), name
    assert (processor.image_height, processor.decoder_image_size, processor.crop) == (96, 64, "center")


def refused(capsys, tmp_path, checkpoint, complaint, **parts):
    """The exit status is 2, one sentence on stderr contains `complaint`, and nothing is written."""
    output = tmp_path / "output" / "vlv"
    assert convert(checkpoint, output, **parts) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vlv convert: error: ") and complaint in error, error
    assert not list(output.parent.glob("*"))


@pytest.mark.parametrize("layout", [flat, old_torch_format, safetensors])
def test_a_truncated_file(layout, tensors1, tmp_path, capsys):
    path = layout(tensors1, tmp_path)
    path = path / "pytorch_model.bin" if path.is_dir() else path
    for length in (path.stat().st_size - 1000, 100, 0):
        os.truncate(path, length)
        refused(capsys, tmp_path, path, f"{path}")


class Malice:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_not_run(save, tensors1, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({**tensors1, "query_embed": Malice()}, tmp_path / "model.pt")
    refused(capsys, tmp_path, tmp_path / "model.pt", "cannot be read safely")
    assert not (tmp_path / "owned").exists()


def test_another_architecture(tmp_path, capsys):
    save_file({"model.embed_tokens.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    refused(capsys, tmp_path, tmp_path, "is not a checkpoint of the paper's code: it has no query_embed")


def test_no_tensors(tmp_path, capsys):
    torch.save([1, 2], tmp_path / "model.pt")
    refused(capsys, tmp_path, tmp_path, "holds no state dict")


def test_an_extra_tensor(tensors1, tmp_path, capsys):
    path = flat({**tensors1, "ema.decay": torch.ones(1)}, tmp_path)
    refused(capsys, tmp_path, path, "holds 1 tensors that have no place in a VLV: ema.decay")


@pytest.mark.parametrize(
    "name", ["unet.conv_in.weight", "query_embed", "model.image_projection", "language_proj.0.bias"]
)
def test_a_missing_tensor(name, tensors1, tmp_path, capsys):
    path = flat({key: tensor for key, tensor in tensors1.items() if key != name}, tmp_path)
    refused(capsys, tmp_path, path, "no query_embed" if name == "query_embed" else "lacks 1 tensors: ")


@pytest.mark.parametrize("table", ["shared", "encoder.embed_positions"])
def test_a_missing_embedding_table(table, tensors1, tmp_path, capsys):
    left = {name: tensor for name, tensor in tensors1.items() if "embed_tokens" not in name}
    del left[f"model.language_model.model.{table}.weight"]
    refused(capsys, tmp_path, flat(left, tmp_path), f"Florence-2 has no 'language_model.{table}.weight'")


def test_tied_copies_that_differ(tensors1, tmp_path, capsys):
    name = "model.language_model.model.decoder.embed_tokens.weight"
    path = flat({**tensors1, name: tensors1[name] + 1}, tmp_path)
    refused(capsys, tmp_path, path, "are one tensor in a VLV, but they differ")


def test_a_config_that_contradicts_the_weights(tmp_path, capsys):
    shutil.copytree(FLORENCE, tmp_path / "florence")
    config = json.loads((tmp_path / "florence" / "config.json").read_text())
    config["text_config"]["encoder_ffn_dim"] = 50
    (tmp_path / "florence" / "config.json").write_text(json.dumps(config))
    complaint = "does not fit --encoder: encoder.language_model.encoder.layers.0.fc1.weight is (48, 64)"
    refused(capsys, tmp_path, STAGE1, complaint, encoder=str(tmp_path / "florence"))


def test_missing_parts(tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    refused(capsys, tmp_path, nowhere, "There is no file or folder")
    refused(capsys, tmp_path, "nobody/nothing", "There is no file or folder nobody/nothing, and no model")
    refused(capsys, tmp_path, STAGE1, f"There is no file or folder {nowhere}, which --encoder names", encoder=nowhere)
    refused(capsys, tmp_path, STAGE1, f"There is no file or folder {nowhere}, which --decoder names", decoder=nowhere)
    refused(capsys, tmp_path, STAGE1, "name the Stable Diffusion it was trained with as --decoder", decoder="none")
    refused(capsys, tmp_path, STAGE1, "leave --caption_head out", caption_head=QWEN)
    refused(
        capsys, tmp_path, STAGE2, "caption head is 96 wide, and the published one 896 or 1536 or 2048: name the one"
    )
    refused(capsys, tmp_path, STAGE2, "decoder is 64 wide", decoder=None, caption_head=QWEN)
    refused(capsys, tmp_path, tmp_path, "holds no checkpoint")


def test_a_missing_shard(tensors1, tmp_path, capsys):
    sharded(tensors1, tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    refused(capsys, tmp_path, tmp_path, "names pytorch_model-00002-of-00002.bin, but there is no such file")


def test_an_output_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "vlv").mkdir()
    (tmp_path / "vlv" / "config.json").write_text("mine")
    assert convert(STAGE1, tmp_path / "vlv") == 2
    assert "already exists and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "vlv" / "config.json").read_text() == "mine"


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(VLVProcessor, "save_pretrained", interrupt)  # after the weights are written
    assert convert(STAGE1, tmp_path / "vlv") == 130
    assert not list(tmp_path.iterdir())


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory(tmp_path, text_encoder_only):
    """The peak memory of a conversion is little more than the checkpoint, because its file is mapped and not read."""
    checkpoint = big.write_checkpoint(tmp_path)
    size = checkpoint.stat().st_size / 2**20
    assert size > 2e9 / 2**20
    peak = big.measure(
        f"model, _, _ = vlv.models.convert.convert_checkpoint("
        f"{str(checkpoint)!r}, {FLORENCE!r}, {text_encoder_only!r}, "
        f"{str(tmp_path / 'llm')!r}, 64)\nmodel.save_pretrained({str(tmp_path / 'vlv')!r})"
    )
    print(f"\nconverting {size:,.0f} MB takes {peak:,.0f} MB, {peak / size:.2f} times as much")
    assert peak < 1.3 * size
    # The same holds for loading the result. Every weight is read, because mapped weights would not count.
    peak = big.measure(
        f"model = VLVForConditionalGeneration.from_pretrained({str(tmp_path / 'vlv')!r})\n"
        "assert not any(weight.isnan().any() for weight in model.parameters())"
    )
    assert peak > size / 2
    print(f"loading {size:,.0f} MB takes {peak:,.0f} MB, {peak / size:.2f} times as much")
    assert peak < 1.2 * size
