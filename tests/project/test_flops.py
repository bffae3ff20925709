"""The count of operations, against counts by hand and against the model run as a whole."""

import subprocess
import sys

import pytest
import tiny
import torch
from paths import ROOT

from benchmarks import flops
from benchmarks.flops import Stage1, Stage2
from vlv import bundled_checkpoint
from vlv.models.loading import read_config

QUERIES, TOKENS = 10, 7


@pytest.fixture(scope="module")
def config():
    return tiny.config()


def linear(rows, inputs, outputs):
    return 2 * rows * inputs * outputs


def head_by_hand(config, rows, keys, logits):
    """A Qwen2 forward: products with weights for each row, attention of each row with its keys, logits."""
    head = config.caption_config
    width, inner = head.hidden_size, head.intermediate_size
    size = width // head.num_attention_heads
    narrow = head.num_key_value_heads * size
    layer = 2 * linear(rows, width, width) + 2 * linear(rows, width, narrow) + 3 * linear(rows, width, inner)
    attention = 2 * 2 * rows * keys * width
    return head.num_hidden_layers * (layer + attention) + linear(logits, width, head.vocab_size)


def projection_by_hand(config):
    width, head = config.caption_embeds_width, config.caption_config.hidden_size
    return linear(QUERIES, width, head) + linear(QUERIES, head, head)


def test_single_layers():
    def work():
        convolution = torch.nn.Conv2d(3, 8, 5, stride=2, padding=2, device="meta")
        return convolution(torch.empty(2, 3, 16, 16, device="meta"))

    counted, result = flops.count(work)
    assert result.shape == (2, 8, 8, 8) and counted == 2 * 2 * 8 * 8 * 8 * (3 * 5 * 5)


def test_stage_2_by_hand(config):
    parts = flops.stage_2(config, Stage2(32, TOKENS))
    rows = QUERIES + TOKENS
    head = head_by_hand(config, rows, rows, TOKENS + 1)
    assert parts["caption head"] == projection_by_hand(config) + head
    # Backward: twice the forward, but that the first projection needs no gradient of the frozen context.
    first = linear(QUERIES, config.caption_embeds_width, config.caption_config.hidden_size)
    whole = 2 * parts["caption head"] - first
    attention = config.caption_config.num_hidden_layers * 2 * 2 * rows * rows * config.caption_config.hidden_size
    assert 0 <= parts["caption head, backward"] - whole <= 0.5 * attention  # attention computes its scores once more
    assert not {name for name in parts if "backward" in name} - {"caption head, backward"}


def test_captioning_by_hand_token_by_token(config):
    parts = flops.captioning(config, 32, TOKENS)
    assert parts["prefix projection"] == projection_by_hand(config)
    assert parts["caption head, prefix"] == head_by_hand(config, QUERIES, QUERIES, 1)
    steps = sum(head_by_hand(config, 1, QUERIES + step, 1) for step in range(1, TOKENS))
    assert parts["caption head, tokens"] == steps
    fewer = flops.captioning(config, 32, TOKENS, num_queries=3)
    assert fewer["caption head, prefix"] == head_by_hand(config, 3, 3, 1)
    assert fewer["vision tower"] == parts["vision tower"]


@pytest.mark.slow
def test_parts_of_stage_1_add_up_to_the_whole_model(config):
    parts = flops.stage_1(config, Stage1(32))
    model = flops.build(tiny.config()).set_stage("autoencode").train()
    images = flops.pixels(32)

    def step():
        model(images, decoder_pixel_values=images).loss.backward()

    whole, _ = flops.count(step)
    assert sum(parts.values()) == pytest.approx(whole, rel=1e-9)


@pytest.mark.slow
def test_muon_by_hand(config):
    plain, muon = flops.stage_1(config, Stage1(32)), flops.stage_1(config, Stage1(32, muon_batch=4))
    text = config.encoder_config.text_config
    width, inner, embeds = text.d_model, text.encoder_ffn_dim, config.caption_embeds_width
    square, wide = 4, 2  # matrices of an attention, and of its feed-forward part
    layers = [(width, width)] * (square * text.encoder_layers + 2 * square * text.decoder_layers)
    layers += [(width, inner)] * (wide * (text.encoder_layers + text.decoder_layers))
    shapes = [sorted(shape) for shape in (*layers, (width, embeds), (embeds, embeds))]
    # Five times: a matrix with its transpose, the square of that, and both with the matrix again.
    expected = 5 * sum(2 * linear(short, long, short) + linear(short, short, short) for short, long in shapes)
    assert muon.pop("Muon") == expected / 4 and muon == plain


def test_what_each_setting_of_stage_1_changes(config):
    plain = flops.stage_1(config, Stage1(32))
    drawn = flops.stage_1(config, Stage1(32, noise_draws=4))
    for name, operations in plain.items():
        assert drawn[name] == operations * (4 if name.startswith("denoiser") else 1)
    assert flops.per_unit(Stage1(32, noise_draws=4), drawn) < flops.per_unit(Stage1(32), plain)
    cached = flops.stage_1(config, Stage1(32, cached=True))
    assert cached == {name: value for name, value in plain.items() if name not in ("vision tower", "VAE")}
    smaller = flops.stage_1(config, Stage1(16))
    assert smaller["vision tower"] < plain["vision tower"] / 3 and smaller["denoiser"] == plain["denoiser"]
    checkpointed = flops.stage_1(config, Stage1(32, checkpointing=True))
    assert checkpointed["denoiser, backward"] > plain["denoiser, backward"]
    few = flops.stage_1(config, Stage1(32, num_queries=2))
    assert few["denoiser"] < plain["denoiser"] and few["text encoder"] < plain["text encoder"] / 4


def test_memory_traffic_of_captions(config):
    head = config.caption_config
    alone = flops.caption_traffic(config, TOKENS, 1)
    many = flops.caption_traffic(config, TOKENS, 8)
    size = head.hidden_size // head.num_attention_heads
    each = 2 * 2 * head.num_hidden_layers * head.num_key_value_heads * size
    assert alone["caption head's cache"] == many["caption head's cache"]
    assert alone["caption head's cache"] == each * sum(QUERIES + step for step in range(TOKENS))
    assert many["caption head's weights"] * 8 == alone["caption head's weights"]


def test_a_bundled_model_is_counted(monkeypatch):
    counted = []
    monkeypatch.setattr(flops, "record", lambda config, _: counted.append(config) or {"operations": {}})
    monkeypatch.setattr(sys, "argv", ["flops", "--model", "vlv-tiny"])
    flops.main()
    assert counted[0].to_dict() == read_config(bundled_checkpoint("vlv-tiny")).to_dict()


@pytest.mark.parametrize("module", ["benchmarks.flops", "experiments.doodles", "experiments"])
def test_a_wrong_model_is_refused_in_one_line(module, tmp_path):
    command = [sys.executable, "-m", module, "--model", "nowhere"]
    if module == "experiments":
        command += ["spatial", "--output", str(tmp_path), "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    # On some processors bitsandbytes warns at its import, which comes before `vlv.cli.run` here.
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("Failed to load CPU gemm_4bit")]
    assert done.returncode == 2 and line.startswith(f"python -m {module}: error: ") and "nowhere" in line
