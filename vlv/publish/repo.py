"""Builds the model repo in a local folder."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from modeling_vlv import VLVForConditionalGeneration, VLVModel
from processing_vlv import VLVProcessor
from vlv.publish.card import model_card
from vlv.publish.samples import Sample

LICENSE = Path(__file__).parent / "LICENSE"
# Records of evaluation and training beside the weights. A training in several stages has a folder for each.
RECORDS = ("results.json", "training.json", "training/*/*")


def build_model_repo(
    source: str,
    folder: Path,
    repo_id: str,
    samples: Sequence[Sample],
    license: str,
    captioner_only: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """
    Write everything that users of the VLV `source` need into `folder`: weights, configs, processor and code (written
    by `save_pretrained`), licence, records, sample pictures and the model card.

    Args:
        source: folder or Hub id of a VLV.
        repo_id: its name in the card.
        samples: from [`make_samples`] of the same source.
        license: of the weights; see [`weights_license`].
        captioner_only: leave the diffusion decoder out.
    """
    model_class = VLVForConditionalGeneration if captioner_only else VLVModel
    model = model_class.from_pretrained(source, dtype="auto")
    for part in (model.config.encoder_config, model.config.text_encoder_config, model.config.caption_config):
        if part is not None and Path(part._name_or_path).exists():  # it means nothing on other machines
            part._name_or_path = ""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    VLVProcessor.from_pretrained(source).save_pretrained(folder)
    shutil.copyfile(LICENSE, folder / "LICENSE")
    for record in (file for pattern in RECORDS for file in Path(source).glob(pattern)):
        target = folder / record.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(record, target)
    (folder / "samples").mkdir()
    for sample in samples:
        sample.image.save(folder / "samples" / f"{sample.name}.png")
        if sample.reconstruction is not None:
            sample.reconstruction.save(folder / "samples" / f"{sample.name}-rebuilt.png")
    model_card(folder, repo_id, model, samples, license).save(folder / "README.md")
