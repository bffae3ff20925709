"""Prompts, styles and wishes about words in `vlv caption`, `vlv serve`, the app and `vlv evaluate`."""

import asyncio
import json
from io import BytesIO

import gradio as gr
import httpx
import pytest
import tiny
from datasets import Dataset
from datasets import Image as ImageFeature
from served import COMPLETIONS, complaint, contents, data_url

from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.cli import main
from vlv.models.loading import load_captioner
from vlv.serving.app import Limits, make_app
from vlv.serving.service import Service
from vlv_app.studio import Studio

SHORT = ("--max_new_tokens", "12", "--num_workers", "0", "--device", "cpu")
PROMPTS = {"0.png": "why?", "2.png": "Be brief."}  # the image 1.png has none


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, picture in enumerate(tiny.images(3)):
        picture.save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def expected(prompted_repo):
    """The caption of a picture with these wishes, written alone."""
    model, processor = load_captioner(str(prompted_repo), "cpu")

    def expected(number, **wishes):
        captioner = Captioner(model, processor, Decoding(**{"max_new_tokens": 12, **wishes}), 1)
        return captioner(["a"], processor(images=tiny.images(3)[number])["pixel_values"])[0][0].text

    return expected


def run(*arguments):
    return main(["caption", *map(str, arguments), *SHORT])


def captions(file):
    return {row["file_name"]: row["text"] for row in map(json.loads, file.read_text().splitlines())}


# ---- the command -------------------------------------------------------------------------------------------


def test_a_prompt_for_some_of_the_images(photos, prompted_repo, expected, tmp_path):
    lines = [json.dumps({"file_name": name, "prompt": prompt}) for name, prompt in PROMPTS.items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    common = (photos, "--model", prompted_repo, "--prompt_file", tmp_path / "prompts.jsonl")
    assert run(*common, "--output", tmp_path / "a.jsonl") == 0
    own = {f"{number}.png": expected(number, prompt=PROMPTS.get(f"{number}.png")) for number in range(3)}
    assert captions(tmp_path / "a.jsonl") == own
    assert run(*common, "--style", "short", "--output", tmp_path / "b.jsonl") == 0
    assert captions(tmp_path / "b.jsonl") == own | {"1.png": expected(1, style="short")}


def test_a_column_of_prompts(photos, prompted_repo, expected, tmp_path, capsys):
    table = {"image": tiny.images(3), "asks": ["why?", None, "long " * 100], "id": ["a", "b", "c"]}
    Dataset.from_dict(table).cast_column("image", ImageFeature()).to_parquet(tmp_path / "t.parquet")
    common = (tmp_path / "t.parquet", "--model", prompted_repo, "--id_column", "id")
    assert run(*common, "--prompt_column", "asks", "--output", tmp_path / "a.jsonl") == 0
    assert captions(tmp_path / "a.jsonl") == {"a": expected(0, prompt="why?"), "b": expected(1)}
    (failure,) = map(json.loads, (tmp_path / "a.jsonl.failures.jsonl").read_text().splitlines())
    assert failure["file_name"] == "c" and "Shorten the prompt" in failure["error"]
    capsys.readouterr()
    assert run(*common, "--prompt_column", "no", "--output", tmp_path / "b.jsonl") != 0
    assert "there is no column no of prompts: there are image, asks, id" in capsys.readouterr().err


def test_wishes_about_words(photos, prompted_repo, expected, tmp_path):
    wishes = {"trigger_words": "ohwx", "caption_prefix": "photo of", "caption_suffix": "end", "clean_tags": True}
    options = ("--trigger_words", "ohwx", "--caption_prefix", "photo of", "--caption_suffix", "end", "--clean_tags")
    assert run(photos, "--model", prompted_repo, *options, "--output", tmp_path / "a.jsonl") == 0
    written = captions(tmp_path / "a.jsonl")
    assert written == {f"{number}.png": expected(number, **wishes) for number in range(3)}
    assert all(text.startswith("ohwx, photo of ") and text.endswith(" end") for text in written.values())


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--style", "long"), "There is no style 'long' in this checkpoint: its styles are short, words."),
        (("--style", "short", "--prompt", "why?"), "--prompt and --style both say what the captions are to be"),
        (("--words", "3"), "words is '3': give the least and the most words of a caption, such as 20-40."),
        (("--prompt_file", "{tmp}/missing.jsonl"), "missing.jsonl"),
        (("--prompt_file", "{tmp}/other.jsonl"), "None of the images has a prompt in"),
        (("--prompt_file", "{tmp}/wrong.jsonl"), "wrong.jsonl, line 2 is not a prompt: The prompt 1 is not text"),
    ],
)
def test_what_the_command_refuses(options, sentence, photos, prompted_repo, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text('{"file_name": "x.png", "prompt": "why?"}\n')
    (tmp_path / "wrong.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "1.png", "prompt": 1}\n')
    options = [option.format(tmp=tmp_path) for option in options]
    assert run(photos, "--model", prompted_repo, *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert sentence in line


@pytest.mark.parametrize("option", [("--prompt", "why?"), ("--style", "short"), ("--prompt_file", "{tmp}/p.jsonl")])
def test_a_model_without_prompts_says_so(option, photos, tiny_repo, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"file_name": "0.png", "prompt": "why?"}\n')
    option = [part.format(tmp=tmp_path) for part in option]
    assert run(photos, "--model", tiny_repo, *option) == 2
    assert "This checkpoint takes no prompts" in capsys.readouterr().err


def test_info_lists_the_styles(prompted_repo, tiny_repo, capsys):
    assert not main(["info", str(prompted_repo)])
    assert "  short: Be brief.\n  words: In {words} words." in capsys.readouterr().out
    assert not main(["info", str(tiny_repo)])
    assert "prompt" not in capsys.readouterr().out


# ---- the endpoint ------------------------------------------------------------------------------------------


def ask(repo, *requests):
    """The answers to requests about the first picture: its messages' words, and other fields."""
    model, processor = load_captioner(str(repo), "cpu")
    service = Service(Captioner(model, processor, Decoding(max_new_tokens=12)), "tiny", largest_image=10**6)
    content = BytesIO()
    tiny.images(1)[0].save(content, "PNG")
    image = {"type": "image_url", "image_url": {"url": data_url(content.getvalue())}}

    async def all_of_them():
        transport = httpx.ASGITransport(make_app(service, Limits()), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
            bodies = [
                {"messages": [{"role": "user", "content": [image, {"type": "text", "text": words}]}], **fields}
                for words, fields in requests
            ]
            return await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))

    try:
        return asyncio.run(all_of_them())
    finally:
        service.close()


def test_the_endpoint_follows_the_same_wishes(prompted_repo, expected):
    asked, other, styled, worded, wrong = ask(
        prompted_repo,
        ("why?", {}),
        ("another question?", {}),
        ("why?", {"style": "short"}),
        ("why?", {"words": "1-2", "trigger_words": "ohwx"}),
        ("why?", {"style": "long"}),
    )
    assert contents(asked) == [expected(0, prompt="why?")] and "warning" not in asked.json()
    assert contents(other) == [expected(0, prompt="another question?")]
    assert contents(styled) == [expected(0, style="short")]
    assert contents(worded) == [expected(0, prompt="why?", words="1-2", trigger_words="ohwx")]
    assert complaint(wrong) == "There is no style 'long' in this checkpoint: its styles are short, words."


def test_the_endpoint_of_a_model_without_prompts(tiny_repo, expected):
    answer, refused = ask(tiny_repo, ("why?", {}), ("", {"style": "short"}))
    assert contents(answer) == [expected(0)]
    sentence = "This checkpoint takes no prompts: the user's words are ignored, and the image is captioned."
    assert answer.json()["warning"] == sentence
    assert complaint(refused).startswith("This checkpoint takes no prompts, and the style 'short' is given")


# ---- the app -----------------------------------------------------------------------------------------------


def result_of(steps):
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_the_app_follows_the_same_wishes(prompted_repo, tiny_repo, expected):
    studio = Studio(str(prompted_repo))
    assert studio.takes_prompts and list(studio.styles) == ["short", "words"]
    pixel_values = studio.processor(images=tiny.images(3)[0])["pixel_values"]
    wishes = ({"prompt": "why?"}, {"style": "short"}, {"words": "2-3"}, {"prompt": "why?", "words": "1-2"})
    for wish in (*wishes, {"trigger_words": "ohwx, a", "clean_tags": True}):
        (caption,) = result_of(studio.caption(pixel_values, 12, **wish))
        assert caption.text == expected(0, **wish)
    with pytest.raises(gr.Error, match="There is no style 'long'"):
        result_of(studio.caption(pixel_values, 12, style="long"))
    plain = Studio(str(tiny_repo))
    assert not plain.takes_prompts and plain.styles == {}
    with pytest.raises(gr.Error, match="This checkpoint takes no prompts"):
        result_of(plain.caption(pixel_values, 12, prompt="why?"))


# ---- questions answered by the model ----------------------------------------------------------------------


def test_questions_are_answered_from_the_image(photos, prompted_repo, tiny_repo, expected, tmp_path, capsys):
    true = expected(0, prompt="why?", max_new_tokens=16)
    questions = [
        {"image": "0.png", "question": "why?", "answer": true},
        {"image": "1.png", "question": "why?", "answer": "another answer"},
        {"image": "1.png", "question": "which?", "answer": "a", "choices": ["a", "bb"]},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    common = ["evaluate", "--dataset", str(photos), "--metrics", "questions", "--answer_from", "image"]
    common += ["--questions", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "r.json"), "--device", "cpu"]
    assert not main([*common, "--model", str(prompted_repo)])
    (folder,) = (tmp_path / "r.work").glob("answers-*")
    first, second, chosen = [row["answer"] for row in map(json.loads, (folder / "answers.jsonl").open())]
    assert first == true and second == expected(1, prompt="why?", max_new_tokens=16)
    assert chosen == likeliest(prompted_repo, tiny.images(3)[1], "which?", ["a", "bb"])
    right = (1 + (chosen == "a") + (second == "another answer")) / 3
    assert json.loads((tmp_path / "r.json").read_text())["metrics"][f"questions/{photos.name}/accuracy"][
        "value"
    ] == pytest.approx(right)
    capsys.readouterr()
    assert main([*common, "--model", str(tiny_repo)]) == 2
    assert "takes no prompts and cannot answer questions about images" in capsys.readouterr().err
    assert main([*common, "--model", str(prompted_repo), "--llm", "x/y"]) == 2
    assert "--llm is for --answer_from caption" in capsys.readouterr().err


def likeliest(repo, image, prompt, choices):
    """The choice whose tokens, without the end, have the highest mean likelihood; each is scored alone."""
    model, processor = load_captioner(str(repo), "cpu")
    scores = []
    for choice in choices:
        inputs = processor(images=image, text=choice, prompt=prompt)
        count = len(processor.tokenizer(choice).input_ids)
        logits = model(**inputs).logits[0].log_softmax(-1)[-count - 1 : -1]
        scores.append(logits.gather(1, inputs["input_ids"][0, -count:, None]).mean().item())
    return choices[scores.index(max(scores))]
