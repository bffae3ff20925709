"""`vlv evaluate` on a dataset, as a user runs it."""

import json
import math
from pathlib import Path

import judges
import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import vlv
from vlv.cli import main
from vlv.evaluation import scorer
from vlv.evaluation.questions import Answerer, Question, read_questions, write_prompts
from vlv.evaluation.scores import FAMILIES
from vlv.evaluation.work import Work
from vlv.judging.judge import Judge
from vlv.models.loading import load_autoencoder
from vlv.scenes import sample_picture
from vlv.scenes.scorer import SceneScorer

TEXTS = ["a red circle", "two birds, a dog", "blue sky", "a red square and a tree"]
NAMES = ["a.png", "b.png", "sub/a.png", "sub/c.png"]  # two of them are called a.png
QUICK = ["--max_new_tokens", "8", "--num_inference_steps", "2", "--batch_size", "3"]


def _main(*arguments):
    return main(["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An ImageFolder of four captioned images, and questions about them."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, image in zip(NAMES, tiny.images(4, size=(40, 30)), strict=True):
        image.save(folder / name)
    rows = [{"file_name": name, "text": text} for name, text in zip(NAMES, TEXTS, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    rows = [
        {"image": "a.png", "question": "What colour?", "choices": ["red", "green", "dark blue"], "answer": "red"},
        {"image": "a.png", "question": "How many?", "answer": ["1"] * 6 + ["one circle"] * 4},
        {"image": "sub/a.png", "question": "What is it?", "choices": ["a sky", "a tree"], "answer": "a tree"},
    ]
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The pretrained models for the scores."""
    return judges.save_all(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="module")
def everything(photos, questions, judged, tiny_repo, tiny_components, tmp_path_factory):
    """One run with all metrics: its arguments, and the file that it wrote."""
    output = tmp_path_factory.mktemp("everything") / "results.json"
    arguments = [
        *("--model", tiny_repo, "--dataset", photos, "--metrics", ",".join(FAMILIES), "--output", output),
        *("--clip", judged / "clip", "--feature_extractor", judged / "features"),
        *("--sentence_encoder", judged / "sentences", "--text_to_image", tiny_components / "decoder"),
        *("--guidance_scales", 1, 3.5, "--questions", questions, "--llm", tiny_components / "caption_head"),
        *("--shots", 1, *QUICK),
    ]
    assert _main(*arguments) == 0
    return arguments, output


def _captions(work):
    (file,) = work.glob("captions-*/captions.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def _levels(file):
    """A picture's pixels, 0..255, as floats, so that they can be subtracted."""
    return np.asarray(Image.open(file), dtype=float)


# ---- what is measured --------------------------------------------------------------------------------------


def test_results_hold_every_score(everything, photos):
    results = json.loads(everything[1].read_text())
    drawn = ["photos at guidance 1", "photos at guidance 3.5"]
    expected = {
        f"{family}/{images}/{score}"
        for family, scores in FAMILIES.items()
        for images in (drawn if family == "caption_to_image" else ["photos"])
        for score in scores
    }
    assert results["metrics"].keys() == expected
    for name, metric in results["metrics"].items():
        assert math.isfinite(metric["value"]), name
        of_the_set = name.split("/")[2] in ("fid", "kid", "distinct_1", "distinct_2") or "bleu" in name
        assert (metric["standard_error"] is None) == of_the_set, name
        assert metric["n"] == (3 if "questions" in name else 4)
    assert results["dataset"] == str(photos)
    assert results["seed"] == 0
    assert {"vlv", "torch", "evaluate", "torchmetrics", "pycocoevalcap"} <= results["versions"].keys()
    assert results["commit"]


def test_captions_and_reconstructions_are_the_models_own(everything, photos, tiny_model):
    processor, work = tiny.processor(), everything[1].with_suffix(".work")
    results = json.loads(everything[1].read_text())["metrics"]
    rows, psnr = _captions(work), []
    (folder,) = work.glob("reconstruction-*")
    for number, name in enumerate(NAMES):
        inputs = processor(images=photos / name, return_decoder_pixel_values=True)
        ids = tiny_model.generate(inputs["pixel_values"], max_new_tokens=8)
        assert rows[number]["file_name"] == name
        assert rows[number]["text"] == processor.batch_decode(ids)[0]
        assert rows[number]["ended"] == (tiny_model.generation_config.eos_token_id in ids[0])
        (rebuilt,) = tiny_model.reconstruct(
            inputs["pixel_values"], num_inference_steps=2, generator=torch.Generator().manual_seed(number)
        )
        kept = _levels(folder / f"{number:08}.png")
        assert np.abs(kept - np.asarray(rebuilt)).max() <= 1
        original = (inputs["decoder_pixel_values"][0].permute(1, 2, 0).numpy() + 1) * 127.5
        psnr.append(10 * np.log10(255**2 / ((kept - original) ** 2).mean()))
    assert results["reconstruction/photos/psnr"]["value"] == pytest.approx(np.mean(psnr), rel=1e-4)
    error = np.std(psnr) / len(psnr) ** 0.5
    assert results["reconstruction/photos/psnr"]["standard_error"] == pytest.approx(error, rel=1e-3)


def test_explained_is_the_judges_score_of_the_written_captions(everything, photos, tiny_model, tiny_processor):
    _, output = everything
    judge = Judge(tiny_model, tiny_processor, ["explained"])
    scores = [
        judge([judge.read(photos / row["file_name"])], [[row["text"]]])[0][0]["explained"]
        for row in _captions(output.with_suffix(".work"))
    ]
    value = json.loads(output.read_text())["metrics"]["captions/photos/explained"]["value"]
    assert value == pytest.approx(np.mean(scores), abs=1e-4)


def test_captions_are_drawn_by_the_pipeline_given(everything, tiny_components):
    work = everything[1].with_suffix(".work")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_components / "decoder")
    folders = {
        json.loads((folder / "settings.json").read_text())["guidance_scale"]: folder
        for folder in work.glob("caption_to_image-*")
    }
    assert folders.keys() == {1.0, 3.5}
    for scale, folder in folders.items():
        for number, row in enumerate(_captions(work)):
            generator = torch.Generator().manual_seed(number)
            (drawn,) = pipeline(row["text"], num_inference_steps=2, guidance_scale=scale, generator=generator).images
            assert np.abs(_levels(folder / f"{number:08}.png") - np.asarray(drawn)).max() <= 1


def test_captions_are_drawn_by_the_models_own_decoder(photos, judged, tiny_repo, tmp_path):
    common = ["--model", tiny_repo, "--dataset", photos, "--metrics", "caption_to_image/clip_similarity", *QUICK]
    common += ["--clip", judged / "clip", "--guidance_scales", 2, "--num", 2]
    assert _main(*common, "--output", tmp_path / "own.json") == 0
    (own,) = (tmp_path / "own.work").glob("caption_to_image-*")
    model, processor = load_autoencoder(str(tiny_repo), "cpu")
    for number, row in enumerate(_captions(tmp_path / "own.work")):
        ids = processor.decoder_tokenizer(row["text"], padding="max_length", truncation=True, return_tensors="pt")
        context = model.text_encoder(input_ids=ids.input_ids)
        assert context.shape[1] == tiny.POSITIONS
        embeds = model.text_encoder.embeddings.token_embedding(ids.input_ids)
        (drawn,) = model.reconstruct(
            caption_embeds=embeds, num_inference_steps=2, generator=torch.Generator().manual_seed(number)
        )
        assert np.abs(_levels(own / f"{number:08}.png") - np.asarray(drawn)).max() <= 1


def test_table_names_each_score(photos, tiny_repo, tmp_path, capsys):
    metrics = "captions/length,reconstruction/psnr"
    output = tmp_path / "results.json"
    arguments = ["--model", tiny_repo, "--dataset", photos, "--metrics", metrics, "--output", output, *QUICK]
    assert _main(*arguments, "--num", 1) == 0
    printed = capsys.readouterr().out
    results = json.loads(output.read_text())
    assert results["num"] == 1
    assert "clip" not in results
    for name, metric in results["metrics"].items():
        assert metric["n"] == 1
        assert metric["standard_error"] is None  # one image has no standard error
        (line,) = [line for line in printed.splitlines() if f" {name.split('/')[2]} " in line]
        assert f" {metric['value']:.4f} " in line


# ---- results that are kept ---------------------------------------------------------------------------------


def _forbid_making(monkeypatch):
    for name in ("load_captioner", "load_autoencoder", "Answerer"):
        monkeypatch.setattr(scorer, name, lambda *arguments: pytest.fail("it was made again"))


def test_nothing_is_made_twice(everything, monkeypatch):
    arguments, output = everything
    before = output.read_text()
    _forbid_making(monkeypatch)
    assert _main(*arguments) == 0
    assert json.loads(output.read_text()) == json.loads(before)


def test_an_interrupted_run_continues(photos, tiny_repo, tmp_path):
    arguments = ["--model", tiny_repo, "--dataset", photos, "--metrics", "captions/length,reconstruction/psnr"]
    arguments += ["--output", tmp_path / "results.json", *QUICK]
    assert _main(*arguments) == 0
    whole = (tmp_path / "results.json").read_text()
    work = tmp_path / "results.work"
    (captions,) = work.glob("captions-*/captions.jsonl")
    lines = captions.read_text().splitlines(keepends=True)
    kept = json.loads(lines[0]) | {"text": "kept from before"}
    captions.write_text(json.dumps(kept) + "\n" + lines[1] + lines[2][:10])  # cut in the middle of a line
    (folder,) = work.glob("reconstruction-*")
    first = (folder / "00000000.png").stat().st_mtime_ns
    rebuilt = _levels(folder / "00000002.png")
    for number in (2, 3):
        (folder / f"{number:08}.png").unlink()

    assert _main(*arguments) == 0
    assert captions.read_text().splitlines(keepends=True) == [json.dumps(kept) + "\n", *lines[1:]]
    assert (folder / "00000000.png").stat().st_mtime_ns == first
    assert np.abs(_levels(folder / "00000002.png") - rebuilt).max() <= 1  # from the same noise, in another batch
    # The caption that was changed is the only difference.
    before, after = (json.loads(text)["metrics"] for text in (whole, (tmp_path / "results.json").read_text()))
    psnr, length = "reconstruction/photos/psnr", "captions/photos/length"
    assert before[psnr]["value"] == pytest.approx(after[psnr]["value"], abs=1e-3)
    assert before[length] != after[length]


@pytest.mark.parametrize("num_beams", ["1", "3"])
def test_the_measured_captions_are_those_of_vlv_caption(photos, tiny_repo, tmp_path, num_beams):
    search = ["--model", tiny_repo, "--max_new_tokens", "12", "--num_beams", num_beams]
    metrics = ["--metrics", "captions/length", "--output", tmp_path / "results.json"]
    assert _main("--dataset", photos, *metrics, *search) == 0
    (measured,) = tmp_path.glob("results.work/captions-*/captions.jsonl")
    assert main(["caption", *map(str, [photos, "--output", tmp_path / "captions.jsonl", *search])]) == 0
    written = {row["file_name"]: row["text"] for row in _rows(tmp_path / "captions.jsonl")}
    assert {row["file_name"]: row["text"] for row in _rows(measured)} == written


def _rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_other_settings_make_other_captions(photos, tiny_repo, tmp_path):
    arguments = ["--model", tiny_repo, "--dataset", photos, "--metrics", "captions/length"]
    arguments += ["--output", tmp_path / "results.json"]
    for length in (3, 8):
        assert _main(*arguments, "--max_new_tokens", length) == 0
    assert len(list((tmp_path / "results.work").glob("captions-*"))) == 2


def test_rows_made_before_an_error_are_kept(tmp_path):
    def make(start):
        for number in range(start, 4):
            if number == 2 and start == 0:
                raise KeyboardInterrupt
            yield {"number": number, "made": start}

    work = Work(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work.rows("things", {}, 4, make)
    assert [row["made"] for row in work.rows("things", {}, 4, make)] == [0, 0, 2, 2]


# ---- questions ---------------------------------------------------------------------------------------------


def test_likeliest_choice_and_written_answer(questions, tiny_components):
    """In one padded batch the answers are the same as one by one with the model's own forward and generate."""
    source = tiny_components / "caption_head"
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    asked = read_questions(str(questions))
    prompts = write_prompts(asked, {"a.png": "a red circle", "sub/a.png": "a long blue sky"})
    expected = []
    for question, prompt in zip(asked, prompts, strict=True):
        start = tokenizer(prompt, return_tensors="pt").input_ids
        likelihoods = {}
        for choice in question.choices:
            ids = tokenizer(f"{prompt} {choice}", return_tensors="pt").input_ids
            with torch.inference_mode():
                chances = llm(ids).logits[0].log_softmax(-1)
            places = range(start.shape[1], ids.shape[1])
            likelihoods[choice] = np.mean([chances[place - 1, ids[0, place]].item() for place in places])
        if likelihoods:
            expected.append(max(likelihoods, key=likelihoods.get))
        else:
            ids = llm.generate(start, max_new_tokens=16, do_sample=False)[0, start.shape[1] :]
            written = tokenizer.decode(ids, skip_special_tokens=True).strip()
            expected.append(written.splitlines()[0].strip() if written else "")
    assert list(Answerer(str(source), batch_size=8).answer(asked, prompts)) == expected
    assert list(Answerer(str(source), batch_size=1).answer(asked, prompts)) == expected


def test_prompt_with_an_example():
    asked = [
        Question("a.png", "What?", ("red", "red", "blue", "pink")),
        Question("b.png", "Which?", ("left",), ("left", "right")),
    ]
    prompts = write_prompts(asked, {"a.png": "A circle.", "b.png": "A square."}, shots=1)
    assert prompts[1].split("\n\n")[1:] == [
        "Description: A circle.\nQuestion: What?\nAnswer: red",
        "Description: A square.\nQuestion: Which?\nChoices: left; right\nAnswer:",
    ]
    assert "Answer: left" in prompts[0]


def test_a_chat_model_is_asked_through_its_chat_template(tiny_components, tmp_path):
    source = tiny_components / "caption_head"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    prompt, choice = Answerer(str(tmp_path))._tokens("Who?", "me")
    assert (tokenizer.decode(prompt), tokenizer.decode(choice)) == ("[Who?]>", "me")


def test_the_error_of_accuracy_uses_images_as_units(everything):
    accuracy = json.loads(everything[1].read_text())["metrics"]["questions/photos/accuracy"]
    (file,) = everything[1].with_suffix(".work").glob("answers-*/answers.jsonl")
    colour, number, thing = (json.loads(line)["answer"] for line in file.read_text().splitlines())
    assert colour in ("red", "green", "dark blue")
    scores = [[float(colour == "red"), float(number.rstrip(".") == "1")], [float(thing == "a tree")]]
    share = sum(map(sum, scores)) / 3
    assert accuracy["value"] == pytest.approx(share)
    residuals = [sum(image) - share * len(image) for image in scores]
    assert accuracy["standard_error"] == pytest.approx(np.sqrt(np.square(residuals).sum()) / 3)


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "options", "words"),
    [
        ("captions", (), ["captions/clip_score needs --clip,", "text_similarity needs --sentence_encoder."]),
        ("reconstruction/fid", (), ["reconstruction/fid needs --feature_extractor."]),
        ("questions", (), ["questions/accuracy needs --llm and --questions."]),
        ("captions/cidre", (), ["captions/cidre is unknown; did you mean captions/cider?"]),
        ("fid", (), ["fid is unknown; did you mean reconstruction/fid?"]),
        ("scenes,captions", (), ["scenes must be alone"]),
        ("", (), ["--metrics names nothing"]),
        ("scenes", (), ["scenes draws its own images"]),
        ("captions/cider", ("--num", 1), ["captions/cider is not defined on 1 image: it needs 2 or more."]),
        ("captions/bleu_1", ("--caption_column", "caption"), ["no captions to compare with", "--caption_column"]),
        ("captions/length", ("--image_column", "picture"), ["no column 'picture'", "--image_column"]),
        ("captions/clip_score", ("--clip", "{judged}/features"), ["--clip", "use a CLIP"]),
        (
            "captions/clip_score",
            ("--clip", "{judged}/nothing"),
            ["There is no file or folder", "nothing, which --clip names"],
        ),
        ("captions/length", ("--dataset", "/no/such/folder"), ["There is no file or folder /no/such/folder"]),
        ("captions/length", ("--model", "{judged}/clip"), ["is not a VLV"]),
        ("captions/length", ("--shots", -1), ["--shots is -1"]),
    ],
)
def test_missing_options_are_named_before_any_work(
    metrics, options, words, photos, judged, tiny_repo, tmp_path, monkeypatch, capsys
):
    _forbid_making(monkeypatch)
    options = [str(option).format(judged=judged) for option in options]
    output = tmp_path / "results.json"
    common = ["--model", tiny_repo, "--dataset", photos, "--output", output, "--metrics", metrics]
    assert _main(*common, *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlv evaluate: error: ")]
    assert all(word in line for word in words), line
    assert not output.with_suffix(".work").exists()


def test_a_dataset_needs_an_output_for_its_results(photos, capsys):
    assert _main("--dataset", photos, "--metrics", "captions/length") == 2
    assert "needs --output" in capsys.readouterr().err
    assert _main("--metrics", "captions/length", "--output", "results.json") == 2
    assert "needs --dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not a question"),
        ('{"image": "a.png", "question": "What?"}', "it has no 'answer'"),
        ('{"image": "a.png", "question": "", "answer": "x"}', "must be texts that are not empty"),
        ('{"image": "a.png", "question": "What?", "answer": ["x", "y"]}', "at least four annotators"),
        ('{"image": "a.png", "question": "What?", "answer": "x", "choices": ["y"]}', "not one of its choices"),
        ('{"image": "a.png", "question": "?", "answer": "cat", "choices": ["cat", "A cat."]}', "are the same"),
        ('{"image": "c.png", "question": "What?", "answer": "x"}', "c.png, which is no image of the dataset photos"),
    ],
)
def test_questions_that_cannot_be_asked(line, words, photos, tiny_repo, tiny_components, tmp_path, capsys):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"image": "b.png", "question": "What?", "answer": "x"}\n' + line + "\n")
    common = ["--model", tiny_repo, "--dataset", photos, "--metrics", "questions", "--output", tmp_path / "r.json"]
    assert _main(*common, "--questions", file, "--llm", tiny_components / "caption_head") == 2
    assert words in capsys.readouterr().err


def test_more_examples_than_questions(photos, questions, tiny_repo, tiny_components, tmp_path, capsys):
    common = ["--model", tiny_repo, "--dataset", photos, "--metrics", "questions", "--output", tmp_path / "r.json"]
    common += ["--questions", questions, "--llm", tiny_components / "caption_head"]
    assert _main(*common, "--shots", 2) == 2
    assert "--shots 2 asks for more examples than there are questions about other images: 1" in capsys.readouterr().err


def test_an_image_without_a_caption(photos, tiny_repo, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "text": " "}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        (folder / row["file_name"]).write_bytes((photos / "a.png").read_bytes())
    common = ["--model", tiny_repo, "--dataset", folder, "--output", tmp_path / "results.json", *QUICK]
    assert _main(*common, "--metrics", "captions/bleu_1") == 2
    assert "The image b.png has no caption in the column 'text'." in capsys.readouterr().err
    assert _main(*common, "--metrics", "captions/length") == 0  # this metric needs no captions


def test_a_model_without_the_needed_part(photos, tiny_processor, tmp_path, capsys):
    tiny.model(caption_config=None).save_pretrained(tmp_path / "mute")
    tiny.model(decoder_config=None).save_pretrained(tmp_path / "blind")
    for name, metrics, words in (
        ("mute", "captions/length", "has no caption head and cannot caption"),
        ("blind", "reconstruction/psnr", "has no diffusion decoder and cannot draw"),
        ("blind", "captions/explained", "has no diffusion decoder, so it cannot compute captions/explained"),
    ):
        tiny_processor.save_pretrained(tmp_path / name)
        common = ["--model", tmp_path / name, "--dataset", photos, "--output", tmp_path / "results.json"]
        assert _main(*common, "--metrics", metrics) == 2
        assert words in capsys.readouterr().err


# ---- scenes ------------------------------------------------------------------------------------------------


def test_scores_of_scenes():
    """vlv-tiny's captions are compared with the true ones as text. An exact caption has equal text."""
    model, processor = load_autoencoder("vlv-tiny", "cpu")
    pictures = [sample_picture("test", number) for number in range(6)]
    scorer = SceneScorer(model, processor, batch_size=4)
    scores = scorer.captions(pictures, "test")
    ids = [model.generate(**processor(images=image), do_sample=False) for image, _ in pictures]
    captions = [processor.batch_decode(row)[0] for row in ids]
    right = [caption == truth.caption for caption, (_, truth) in zip(captions, pictures, strict=True)]
    assert scores["captions/test/exact"].value == np.mean(right)
    phrases = [
        item.phrase in caption
        for caption, (_, truth) in zip(captions, pictures, strict=True)
        for item in truth.objects
    ]
    assert scores["captions/test/objects_right"].value == np.mean(phrases)
    assert scores["captions/test/objects_right"].n == len(phrases)
    assert scores["captions/test/ended"].value == 1
    for name, score in scores.items():
        if name.endswith("_right") and "background" not in name:
            assert score.value >= scores["captions/test/objects_right"].value
    ceilings = scorer.ceilings(pictures, "test")
    assert ceilings["reader on drawings/test/exact"].value == 1
    # One picture has no other image to take the embeddings of.
    assert {name.split("/")[0] for name in scorer.floors(pictures[:1], "test")} == {"empty context"}
    assert "another image's context/test/objects_right" in scorer.floors(pictures[:2], "test")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--split", "test"), "--split is for --dataset: leave it out,"),
        (("--num_beams", 4), "--num_beams is for --dataset: leave it out,"),
        (("--max_new_tokens", 20), "--max_new_tokens is for --dataset: leave it out,"),
        (("--guidance_scales", 1, 2), "--guidance_scales is for --dataset: leave it out,"),
        (("--clip", "clip"), "--clip is for --dataset: leave it out,"),
        (("--metrics", "captions/length", "--dataset", ".", "--world", "emoji"), "--world is for drawn scenes:"),
    ],
)
def test_options_of_the_other_measurement_are_refused(options, sentence, tmp_path, monkeypatch, capsys):
    _forbid_making(monkeypatch)
    assert _main(*options, "--output", tmp_path / "results.json") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_scenes_write_their_settings(tmp_path):
    output = tmp_path / "results.json"
    assert _main("--num", 2, "--num_inference_steps", 1, "--seed", 3, "--output", output) == 0
    results = json.loads(output.read_text())
    bundled = json.loads(Path(vlv.bundled_checkpoint(), "results.json").read_text())
    assert results["metrics"].keys() >= bundled["metrics"].keys()
    assert {name: results[name] for name in ("num", "seed", "num_inference_steps")} == {
        "num": 2,
        "seed": 3,
        "num_inference_steps": 1,
    }
    assert all(math.isfinite(metric["value"]) for metric in results["metrics"].values())
