"""The card of a VLV whose teacher is a transformer: its parts, their sizes and licences."""

import teachers
import tiny

from vlv.publish.repo import build_model_repo
from vlv.publish.samples import Sample


def test_a_transformer(tmp_path):
    model = teachers.model("SD 3.5")
    for part in ("transformer", "vae"):
        model.config.decoder_config[part]["_name_or_path"] = "stabilityai/stable-diffusion-3.5-medium"
    model.save_pretrained(tmp_path / "vlv")
    tiny.processor().save_pretrained(tmp_path / "vlv")
    image = tiny.images(1)[0]
    samples = [Sample("first", image, "a caption", image)]
    build_model_repo(str(tmp_path / "vlv"), tmp_path / "repo", "ada/vlv", samples, "other")
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "SD3Transformer2DModel" in card and "AutoencoderKL" in card and "CLIP" not in card
    assert "Stability AI Community License" in card
    assert "stabilityai/stable-diffusion-3.5-medium" in card.split("---")[1]  # base_model
    count = sum(weight.numel() for weight in model.transformer.parameters())
    assert f"{count:,}" in card or f"{count / 1e6:.1f}" in card
