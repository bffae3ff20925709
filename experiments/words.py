"""Mixed prompts: words that name another background follow an image's caption embeddings (arXiv 2412.06774)."""

from matplotlib.figure import Figure

from experiments.scoring import encode, rebuild, share
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.scenes import sample_picture
from vlv.scenes.reader import scene_reader

PHRASES = ("on a {} background", "a {} background")
KEPT = (0, 8, 12, 16, 17, 18, 19, 20)  # caption embeddings of the image; the words follow


def run(model: VLVModel, processor: VLVProcessor, num: int) -> list[dict]:
    pictures = [sample_picture("test", index) for index in range(num)]
    scenes = [scene for _, scene in pictures]
    named = [_another(scene.background, list(scene.backgrounds), index) for index, scene in enumerate(scenes)]
    embeds = encode(model, processor, [image for image, _ in pictures])
    rows = [_row("none", embeds.shape[1], rebuild(model, embeds), scenes, named)]
    for phrase in PHRASES:
        texts = [phrase.format(background) for background in named]
        length = processor.decoder_tokenizer(texts[:1], return_tensors="pt").input_ids.shape[1] - 1
        for kept in KEPT:
            if kept + length <= embeds.shape[1]:
                drawn = rebuild(model, embeds[:, :kept], text=texts, tokenizer=processor.decoder_tokenizer)
                rows.append(_row(phrase.format("…"), kept, drawn, scenes, named))
    return rows


def _another(background, backgrounds, index):
    others = [name for name in backgrounds if name != background]
    return others[index % len(others)]


def _row(words, kept, drawn, scenes, named):
    found = scene_reader().read(drawn)
    return {
        "words": words,
        "embeddings of the image": kept,
        "named background": share([it.background == name for it, name in zip(found, named, strict=True)]),
        "image's background": share(
            [it.background == scene.background for it, scene in zip(found, scenes, strict=True)]
        ),
        "image's objects": share(
            [sum(item in it.objects for item in scene.objects) for it, scene in zip(found, scenes, strict=True)],
            [len(scene.objects) for scene in scenes],
        ),
    }


def plot(rows: list[dict], figure: Figure) -> None:
    phrases = [words for words in dict.fromkeys(row["words"] for row in rows) if words != "none"]
    for axes, words in zip(figure.subplots(1, len(phrases), sharey=True), phrases, strict=True):
        found = [row for row in rows if row["words"] == words]
        for column in ("named background", "image's background", "image's objects"):
            kept = [row["embeddings of the image"] for row in found]
            axes.plot(kept, [row[column]["value"] for row in found], marker=".", label=column)
        axes.set(xlabel="embeddings of the image", title=words, ylabel="share")
        axes.legend(fontsize="small")
