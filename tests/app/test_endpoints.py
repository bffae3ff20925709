"""The API, as `gradio_client` meets it over HTTP."""

from concurrent.futures import ThreadPoolExecutor

import gradio_client
import numpy as np
import pytest
import torch
from running_app import NEW_TOKENS, caption_of, pixels, upload


@pytest.mark.parametrize("num_beams", [1, 3])
def test_caption_is_the_pipelines(client, captioner, pictures, num_beams):
    caption = client.predict(upload(pictures[0]), NEW_TOKENS, num_beams, api_name="/caption")
    assert caption == caption_of(captioner, str(pictures[0]), num_beams=num_beams)


def test_caption_streams(client, pictures):
    job = client.submit(upload(pictures[0]), 300, api_name="/caption")
    caption = job.result()
    *parts, last = job.outputs()
    assert last == caption
    assert len(set(parts)) > 2
    assert all(caption.startswith(part.strip()) for part in parts)
    assert all(longer.startswith(part) for part, longer in zip(parts, parts[1:], strict=False))


def test_a_caption_can_be_given_its_beginning(client, captioner, pictures, repo, tiny_model, tiny_processor):
    caption = client.predict(upload(pictures[0]), 8, prefix="a red ", api_name="/caption")
    processor = captioner.processor
    inputs = processor(images=str(pictures[0]), text="a red")
    ids = tiny_model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    assert caption == processor.tokenizer.decode([*inputs["input_ids"][0], *ids], skip_special_tokens=True).strip()
    assert caption.startswith("a red")


def test_drawn_captions_are_the_pipelines_of_that_seed(client, captioner, pictures):
    def draw(seed, **place):
        return client.predict(upload(pictures[0]), NEW_TOKENS, temperature=1, seed=seed, **place, api_name="/caption")

    assert draw(3) == caption_of(captioner, str(pictures[0]), do_sample=True, temperature=1.0, seed=3)
    assert draw(4) != draw(3)
    rows = client.predict(
        [upload(file) for file in pictures[:2]], NEW_TOKENS, temperature=1, seed=3, api_name="/caption_many"
    )
    assert rows[0]["text"] == draw(3) and rows[1]["text"] != draw(3)


def test_a_smaller_number_of_queries(client, captioner, pictures, tiny_model, tiny_processor):
    caption = client.predict(upload(pictures[0]), NEW_TOKENS, num_queries=2, api_name="/caption")
    assert caption == caption_of(captioner, str(pictures[0]), num_queries=2) != caption_of(captioner, str(pictures[0]))
    (row,) = client.predict([upload(pictures[0])], NEW_TOKENS, num_queries=2, api_name="/caption_many")
    assert row["text"] == caption
    _, rebuilt, text = client.predict(upload(pictures[0]), 3, num_queries=2, api_name="/reconstruct")
    expected = tiny_model.reconstruct(
        tiny_processor(images=str(pictures[0]))["pixel_values"],
        num_queries=2,
        num_inference_steps=3,
        guidance_scale=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert np.array_equal(pixels(rebuilt), pixels(expected[0]))
    assert text == caption_of(captioner, str(pictures[0]), num_queries=2, max_new_tokens=300)


def test_caption_many_streams_rows(client, captioner, pictures, tmp_path):
    """An image that cannot be read costs the others nothing."""
    broken = tmp_path / "broken.png"
    broken.write_text("This is no picture.")
    files = [pictures[0], broken, pictures[1]]
    job = client.submit([upload(file) for file in files], NEW_TOKENS, api_name="/caption_many")
    rows = job.result()
    assert [row["file_name"] for row in rows] == [file.name for file in files]
    for place in (0, 2):
        assert rows[place]["text"] == caption_of(captioner, str(files[place]))
    assert rows[1]["error"].startswith("broken.png: ") and "text" not in rows[1]
    counts = [len(each) for each in job.outputs()]
    assert counts == sorted(counts) and {1, 2, 3} <= set(counts)


def test_reconstruct_is_the_models(client, captioner, pictures, tiny_model, tiny_processor):
    original, rebuilt, caption = client.predict(upload(pictures[0]), 3, 2.5, 11, api_name="/reconstruct")
    pixel_values = tiny_processor(images=str(pictures[0]))["pixel_values"]
    expected = tiny_model.reconstruct(
        pixel_values, num_inference_steps=3, guidance_scale=2.5, generator=torch.Generator().manual_seed(11)
    )
    assert np.array_equal(pixels(rebuilt), pixels(expected[0]))
    assert np.array_equal(pixels(original), pixels(pictures[0]))
    assert caption == caption_of(captioner, str(pictures[0]), max_new_tokens=300)


def test_compose_joins_a_share_of_each(client, pictures, tiny_model, tiny_processor):
    composed = client.predict(upload(pictures[0]), upload(pictures[1]), 0.3, 3, api_name="/compose")
    embeds = tiny_model.encode(tiny_processor(images=[str(file) for file in pictures[:2]])["pixel_values"])
    expected = tiny_model.reconstruct(  # 3 of the tiny model's 10 queries, then 7
        caption_embeds=torch.cat([embeds[:1, :3], embeds[1:, :7]], dim=1),
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
    )
    difference = pixels(composed).astype(int) - pixels(expected[0])
    assert np.abs(difference).max() <= 1  # the two were encoded as a batch here

    all_first = client.predict(upload(pictures[0]), upload(pictures[1]), 1, 3, api_name="/compose")
    _, alone, _ = client.predict(upload(pictures[0]), 3, api_name="/reconstruct")
    assert np.array_equal(pixels(all_first), pixels(alone))


def test_compose_interpolates(client, pictures, tiny_model, tiny_processor):
    images = [upload(pictures[0]), upload(pictures[1])]
    composed = client.predict(*images, 0.25, 3, method="interpolate", api_name="/compose")
    embeds = tiny_model.encode(tiny_processor(images=[str(file) for file in pictures[:2]])["pixel_values"])
    expected = tiny_model.reconstruct(
        caption_embeds=0.25 * embeds[:1] + 0.75 * embeds[1:],
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
    )
    difference = pixels(composed).astype(int) - pixels(expected[0])
    assert np.abs(difference).max() <= 1  # the two were encoded as a batch here
    with pytest.raises(
        gradio_client.exceptions.AppError, match="no method 'mix' to compose images: give join or interpolate"
    ):
        client.predict(*images, 0.25, 3, method="mix", api_name="/compose")


def test_compose_adds_words(client, pictures, tiny_model, tiny_processor):
    images = [upload(pictures[0]), upload(pictures[1])]
    composed = client.predict(*images, 1, 3, text="a red circle", api_name="/compose")
    (expected,) = tiny_model.reconstruct(
        tiny_processor(images=str(pictures[0]))["pixel_values"],
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        text="a red circle",
        tokenizer=tiny_processor.decoder_tokenizer,
    )
    assert np.array_equal(pixels(composed), pixels(expected))
    without = client.predict(*images, 1, 3, api_name="/compose")
    assert not np.array_equal(pixels(composed), pixels(without))
    with pytest.raises(
        gradio_client.exceptions.AppError, match="Words: text has .* tokens, but the text encoder has .*: shorten it"
    ):
        client.predict(*images, 1, 3, text="a red circle " * 40, api_name="/compose")


def test_endpoints_are_described(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/caption", "/caption_many", "/reconstruct", "/compose"}
    arguments = {
        name: [
            (each["parameter_name"], each["python_type"]["type"], each["parameter_has_default"])
            for each in endpoint["parameters"]
        ]
        for name, endpoint in endpoints.items()
    }
    sampling = [("num_inference_steps", "int", True), ("guidance_scale", "float", True), ("seed", "int", True)]
    length = ("num_queries", "int", True)
    texts = ("prompt", "style", "words", "trigger_words", "caption_prefix", "caption_suffix")
    search = [
        *(("max_new_tokens", "int", True), ("num_beams", "int", True), ("prefix", "str", True)),
        *(("temperature", "float", True), ("seed", "int", True), length),
        *((name, "str", True) for name in texts),
        ("clean_tags", "bool", True),
    ]
    images = {name: (name, "filepath", False) for name in ("image", "first", "second")}
    assert arguments["/caption"] == [images["image"], *search]
    assert arguments["/caption_many"] == [("images", "list[filepath]", False), *search]
    assert arguments["/reconstruct"] == [images["image"], *sampling, length]
    assert arguments["/compose"] == [
        images["first"],
        images["second"],
        ("share", "float", True),
        *sampling,
        ("text", "str", True),
        ("method", "str", True),
    ]
    for endpoint in endpoints.values():
        assert endpoint["description"].endswith(".") and "Parameters" not in endpoint["description"]


@pytest.mark.slow
def test_eight_clients_at_once(app, captioner, pictures):
    expected = [caption_of(captioner, str(file), max_new_tokens=8) for file in pictures]
    assert len(set(expected)) > 1  # or a mixed-up answer would not be noticed

    def ask(number):
        client = app.client()
        return [
            (index % 8, client.predict(upload(pictures[index % 8]), 8, api_name="/caption"))
            for index in range(number, number + 25)
        ]

    with ThreadPoolExecutor(8) as pool:
        answers = [answer for answers in pool.map(ask, range(8)) for answer in answers]
    assert len(answers) == 200
    assert all(caption == expected[index] for index, caption in answers)
