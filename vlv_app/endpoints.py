"""The endpoints of the API. They have inputs and outputs of their own, so that the page may change without them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from vlv_app.parts import CONCURRENCY, SAMPLING, Wrapper, said
from vlv_app.settings import SETTINGS, refusal
from vlv_app.studio import Step, Studio
from vlv_app.work import each_as

MOST_FILES = 1000  # of one request
TEXTS = ("prompt", "style", "words", "trigger_words", "caption_prefix", "caption_suffix")


class Endpoints:
    """The functions behind the API."""

    def __init__(self, studio: Studio):
        self.studio, self.files = studio, studio.files

    def caption(
        self,
        image: str,
        max_new_tokens: int = 300,
        num_beams: int = 1,
        prefix: str = "",
        temperature: float = 0.0,
        seed: int = 0,
        num_queries: int | None = None,
        prompt: str = "",
        style: str = "",
        words: str = "",
        trigger_words: str = "",
        caption_prefix: str = "",
        caption_suffix: str = "",
        clean_tags: bool = False,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how Gradio is asked for one)
    ) -> Iterator[str]:
        """Write a caption for an image. It streams: each value is the caption so far, and the last one is the whole.

        Parameters:
            image: the image file, as it is.
            max_new_tokens: the longest caption, in tokens.
            num_beams: beams of the search; 1 is greedy, and streams the caption as it is written.
            prefix: the beginning of the caption, which the model continues.
            temperature: 0 takes the likeliest words; above 0 they are drawn.
            seed: of what is drawn: equal seeds draw equal captions of an image.
            num_queries: read only so many of the leading caption embeddings; for a model that was trained for it.
            prompt: what the caption is asked to be, or a question; for a model that was trained with prompts.
            style: the name of one of the model's own prompts instead.
            words: how many words the caption has, such as 20-40.
            trigger_words: words that come first, with commas between them.
            caption_prefix: a text before the caption, which the model does not read.
            caption_suffix: a text after it.
            clean_tags: the caption is tags with commas between them: each is kept once.
        """
        yield ""
        pixel_values, _ = self.files.read(image, "image")
        steps = self.studio.caption(
            pixel_values,
            max_new_tokens,
            num_beams,
            prefix=prefix or "",
            temperature=temperature,
            seed=seed,
            num_queries=num_queries,
            prompt=prompt,
            style=style,
            words=words,
            trigger_words=trigger_words,
            caption_prefix=caption_prefix,
            caption_suffix=caption_suffix,
            clean_tags=clean_tags,
        )
        written = yield from _told(steps, progress, lambda step: step.text)
        yield written[0].text

    def caption_many(
        self,
        images: list[str],
        max_new_tokens: int = 300,
        num_beams: int = 1,
        prefix: str = "",
        temperature: float = 0.0,
        seed: int = 0,
        num_queries: int | None = None,
        prompt: str = "",
        style: str = "",
        words: str = "",
        trigger_words: str = "",
        caption_prefix: str = "",
        caption_suffix: str = "",
        clean_tags: bool = False,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[list[dict[str, str]]]:
        """Write captions for many images. It streams: each value is a list of all rows so far. A row holds
        `file_name`, and `text` or, for an image that cannot be read, `error`.

        Parameters:
            images: the image files, as they are.
            max_new_tokens: the longest caption, in tokens.
            num_beams: beams of the search; 1 is greedy.
            prefix: the beginning of all captions, which the model continues.
            temperature: 0 takes the likeliest words; above 0 they are drawn.
            seed: of what is drawn: equal seeds draw equal captions of an image.
            num_queries: read only so many of the leading caption embeddings; for a model that was trained for it.
            prompt: what the caption is asked to be, or a question; for a model that was trained with prompts.
            style: the name of one of the model's own prompts instead.
            words: how many words the caption has, such as 20-40.
            trigger_words: words that come first, with commas between them.
            caption_prefix: a text before the caption, which the model does not read.
            caption_suffix: a text after it.
            clean_tags: the caption is tags with commas between them: each is kept once.
        """
        if not images:
            raise refusal("images: choose some pictures first.")
        if len(images) > MOST_FILES:
            raise refusal(f"images holds {len(images)} files: give at most {MOST_FILES} at once.")
        wishes: dict[str, Any] = {
            "prompt": prompt,
            "style": style,
            "words": words,
            "trigger_words": trigger_words,
            "caption_prefix": caption_prefix,
            "caption_suffix": caption_suffix,
            "clean_tags": clean_tags,
        }
        rows: list[dict[str, str]] = []
        yield []
        for image in images:
            row = {"file_name": Path(image).name}
            try:
                pixel_values, _ = self.files.read(image, "images")
            except gr.Error as error:
                rows.append({**row, "error": error.message.removeprefix("images, ")})
                yield list(rows)
                continue
            steps = self.studio.caption(
                pixel_values,
                max_new_tokens,
                num_beams,
                prefix=prefix or "",
                temperature=temperature,
                seed=seed,
                num_queries=num_queries,
                **wishes,
            )
            written = yield from _told(steps, None, lambda step: list(rows))
            rows.append({**row, "text": written[0].text})
            progress((len(rows), len(images)), desc="Captioning", unit="images")
            yield list(rows)

    def reconstruct(
        self,
        image: str,
        num_inference_steps: int = 8,
        guidance_scale: float = 2.0,
        seed: int = 0,
        num_queries: int | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple[str | None, str | None, str]]:
        """Rebuild an image from its caption embeddings alone: the original, its reconstruction, its caption.

        Parameters:
            image: the image file, as it is.
            num_inference_steps: sampling steps; more are slower and finer.
            guidance_scale: how closely the decoder follows the embeddings; 1 switches guidance off.
            seed: another seed starts from other noise.
            num_queries: read only so many of the leading caption embeddings; for a model that was trained for it.
        """
        yield None, None, ""
        pixel_values, original = self.files.read(image, "image")
        name = Path(image).stem
        answer: tuple[str, str | None, str] = self.files.show(original, name).path, None, ""
        steps = self.studio.reconstruct(pixel_values, num_inference_steps, guidance_scale, seed, num_queries)
        rebuilt = yield from _told(steps, progress, lambda step: answer)
        answer = answer[0], self.files.show(rebuilt, f"{name}-rebuilt").path, ""
        if self.studio.writes:
            written = yield from _told(
                self.studio.caption(pixel_values, num_queries=num_queries), progress, lambda step: answer
            )
            answer = answer[0], answer[1], written[0].text
        yield answer

    def compose(
        self,
        first: str,
        second: str,
        share: float = 0.5,
        num_inference_steps: int = 8,
        guidance_scale: float = 2.0,
        seed: int = 0,
        text: str = "",
        method: str = "join",
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[str | None]:
        """Compose the caption embeddings of two images, a share of each, and rebuild them into one picture.

        Parameters:
            first: the image file that has the share.
            second: the image file that has the rest.
            share: how much of the whole is the first image's, 0 to 1; the rest is the second's.
            num_inference_steps: sampling steps; more are slower and finer.
            guidance_scale: how closely the decoder follows the embeddings; 1 switches guidance off.
            seed: another seed starts from other noise.
            text: words for the picture, where the decoder has a text encoder that reads them.
            method: join (the leading embeddings of each image) or interpolate (a weighted mean of them).
        """
        yield None
        first_values, _ = self.files.read(first, "first")
        second_values, _ = self.files.read(second, "second")
        steps = self.studio.compose(
            first_values, second_values, share, num_inference_steps, guidance_scale, seed, text or "", method
        )
        composed, _ = yield from _told(steps, progress, lambda step: None)
        yield self.files.show(composed, f"{Path(first).stem}-{Path(second).stem}").path


def _told(steps: Any, progress: gr.Progress | None, answer: Callable[[Step], Any]) -> Any:
    """Yields an answer at each step, so that Gradio can end the request there. The result is the computation's."""

    def tell(step: Step) -> Any:
        if progress is not None and step.total:
            progress((step.done, step.total), desc=step.sentence.partition(":")[0], unit="steps")
        return answer(step)

    return (yield from each_as(steps, tell))


def add_endpoints(studio: Studio, on_gpu: Wrapper) -> None:
    """Add what the model has the parts for to the page that is being built. Nobody sees these inputs."""
    endpoints = Endpoints(studio)
    with gr.Column(visible=False):
        if studio.writes:
            inputs = [_image("image"), *_search(studio), *_wishes()]
            _add(on_gpu, endpoints.caption, inputs, gr.Textbox(label="Caption"))
            files = gr.File(file_count="multiple", label="images")
            _add(on_gpu, endpoints.caption_many, [files, *_search(studio), *_wishes()], gr.JSON(label="Rows"))
        if studio.rebuilds:
            pictures = [gr.Image(label=label, format="png") for label in ("Original", "Reconstruction")]
            outputs = [*pictures, gr.Textbox(label="Caption")]
            numbers = [*_numbers(SAMPLING), studio.queries.component()]
            _add(on_gpu, endpoints.reconstruct, [_image("image"), *numbers], outputs)
            method = gr.Textbox("join", label="method")
            inputs = [_image("first"), _image("second"), *_numbers(("share", *SAMPLING)), _text("text"), method]
            _add(on_gpu, endpoints.compose, inputs, gr.Image(label="Composition", format="png"))


def _image(label: str) -> gr.Image:
    image = gr.Image(label=label, type="filepath")
    # The file goes to the processor as it was uploaded. Gradio would open it first: it clips 16-bit images, and fails
    # on what is no image. (A subclass would do, but Gradio writes a .pyi file beside every module that has one.)
    image.preprocess = lambda payload: payload and payload.path  # type: ignore
    return image


def _text(label: str) -> gr.Textbox:
    return gr.Textbox("", label=label)


def _wishes() -> list[gr.components.Component]:
    return [*map(_text, TEXTS), gr.Checkbox(False, label="clean_tags")]


def _numbers(names: Sequence[str]) -> list[gr.components.Component]:
    return [SETTINGS[name].component() for name in names]


def _search(studio: Studio) -> list[gr.components.Component]:
    """How captions are written."""
    numbers = _numbers(("max_new_tokens", "num_beams")), _numbers(("temperature", "seed"))
    return [*numbers[0], _text("prefix"), *numbers[1], studio.queries.component()]


def _add(on_gpu: Wrapper, function: Callable[..., Any], inputs: list[Any], outputs: Any) -> None:
    """An endpoint of the function's name. Its page shows the first paragraph of the docstring."""
    gr.Button(visible=False).click(
        on_gpu(said(function)),
        inputs,
        outputs,
        api_name=function.__name__,
        api_description=" ".join(inspect.getdoc(function).partition("\n\n")[0].split()),
        concurrency_id="model",
        concurrency_limit=CONCURRENCY,
    )
