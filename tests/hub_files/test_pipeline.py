"""The pipelines, made from objects: behaviour that `test_entry_points.py` cannot test from outside."""

import logging

import pytest
import tiny
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from pipeline_vlv import VLVImageTextToTextPipeline, VLVImageToTextPipeline, VLVReconstructionPipeline

GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def captioner(tiny_model, tiny_processor):
    return VLVImageToTextPipeline(model=tiny_model, processor=tiny_processor)


@pytest.fixture(scope="module")
def continuer(tiny_model, tiny_processor):
    return VLVImageTextToTextPipeline(model=tiny_model, processor=tiny_processor)


class Dictate(LogitsProcessor):
    """Makes the model write `text`."""

    def __init__(self, text):
        self.ids = tiny.caption_tokenizer()(text).input_ids
        self.written = 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[self.written]] = 0
        self.written += 1
        return forced


@pytest.mark.parametrize(
    ("text", "new"), [("a", " large dog"), ("a", "a b"), ("", " dog"), ("two ", "two two"), (" the", "n")]
)
def test_a_text_is_continued_even_by_the_same_text(continuer, text, new):
    """The library removes the given text from the beginning of the output, if it finds it there."""

    def write(**arguments):
        generate_kwargs = {"logits_processor": LogitsProcessorList([Dictate(new)]), "max_new_tokens": len(new)}
        (row,) = continuer(images=tiny.images(1), text=[text], generate_kwargs=generate_kwargs, **arguments)
        return row

    assert write() == {"input_text": text, "generated_text": text + new}
    assert write(return_full_text=False)["generated_text"] == new


def test_token_ids_are_only_the_new_ones(continuer, tiny_model, tiny_processor):
    image = tiny.images(1)[0]
    (row,) = continuer(images=image, text="a", return_tensors=True, generate_kwargs=dict(GREEDY))
    expected = tiny_model.generate(**tiny_processor(images=image, text="a"), **GREEDY)
    assert torch.equal(torch.as_tensor(row["generated_token_ids"]).flatten(), expected.flatten())


def test_an_unreadable_image_with_text_is_an_error(continuer, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(ValueError, match=r"notes\.png: this is not an image"):
        continuer(images=str(tmp_path / "notes.png"), text="")
    with pytest.raises(FileNotFoundError, match=r"missing\.png: there is no such file"):
        continuer(images=[tmp_path / "missing.png"], text=[""])


def test_no_images_no_captions(captioner):
    assert captioner([]) == []
    assert captioner(()) == []


def test_any_iterator_works(captioner, tmp_path):
    for number, image in enumerate(tiny.images(2)):
        image.save(tmp_path / f"{number}.png")
    paths = sorted(tmp_path.iterdir())
    assert list(captioner(map(str, paths), **GREEDY)) == captioner(paths, **GREEDY)


def test_mistyped_arguments_are_refused(captioner):
    image = tiny.images(1)[0]
    with pytest.raises(ValueError, match="max_new_token"):
        captioner(image, max_new_tokens=2, max_new_token=3)
    with pytest.raises(ValueError, match="crop is 'top'"):
        captioner(image, crop="top", **GREEDY)
    for nonsense in (3, {"image": image}, None):
        with pytest.raises(ValueError, match="An image cannot be read from a"):
            captioner(nonsense)


def test_rows_that_are_not_images_are_reported_one_by_one(captioner, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    first, second = captioner([tiny.images(1)[0], 3], **GREEDY)
    logger.removeHandler(caplog.handler)
    assert first[0]["generated_text"] and "error" not in first[0]
    assert second[0]["generated_text"] is None and "from a int" in second[0]["error"]


def test_captions_do_not_depend_on_their_batch(captioner):
    images = tiny.images(5)
    alone = [captioner(image, **GREEDY) for image in images]
    for batch_size in (1, 2, 5):
        assert captioner(images, batch_size=batch_size, **GREEDY) == alone


def test_drawn_captions_under_a_seed_do_not_depend_on_their_batch(captioner):
    images = tiny.images(3)
    drawn = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 10}
    alone = [captioner(image, seed=3, **drawn) for image in images]
    assert captioner(images, batch_size=3, seed=3, **drawn) == alone
    assert captioner(images, batch_size=3, seed=4, **drawn) != alone


def test_reconstructions_under_a_seed_do_not_depend_on_their_batch(tiny_model, tiny_processor):
    rebuilder = VLVReconstructionPipeline(model=tiny_model, processor=tiny_processor)
    images = tiny.images(3)
    arguments = {"num_inference_steps": 2, "seed": 5}
    batched = rebuilder(images, batch_size=3, **arguments)
    for image, picture in zip(images, batched, strict=True):
        difference = torch.tensor(list(rebuilder(image, **arguments).tobytes())) - torch.tensor(
            list(picture.tobytes())
        )
        assert difference.abs().max() <= 1
    other = rebuilder(images, num_inference_steps=2, seed=6)
    assert other[0].tobytes() != batched[0].tobytes()


def test_a_missing_part_of_the_checkpoint_is_an_error(tiny_processor):
    image = tiny.images(1)[0]
    captionless = VLVImageToTextPipeline(model=tiny.model(caption_config=None), processor=tiny_processor)
    with pytest.raises(ValueError, match="no caption head and cannot caption"):
        captionless(image)
    decoderless = VLVReconstructionPipeline(model=tiny.model(decoder_config=None), processor=tiny_processor)
    with pytest.raises(ValueError, match="no diffusion decoder and cannot reconstruct"):
        decoderless(image)
