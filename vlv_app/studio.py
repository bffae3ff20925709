"""A model on its device, and the things that the app does with it."""

import re
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from transformers import AutoModel, AutoProcessor, LogitsProcessorList, StoppingCriteriaList

from vlv_app.pictures import PictureFiles
from vlv_app.settings import Setting, check_search, check_settings, refusal
from vlv_app.work import Report, ReportTokens, watch

# A paragraph of a model card. `vlv publish` writes one that begins with "Limits".
PURPOSE = re.compile(r"\*\*(?:Limits|What it is (?:for|not))\.\*\*\s*(.+?)\s*(?:\n\s*\n|\Z)", re.DOTALL)


def join(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """The leading embeddings of the first image, then as many of the second's as are missing."""
    kept = round(share * first.shape[1])
    return torch.cat([first[:, :kept], second[:, : first.shape[1] - kept]], dim=1)


def interpolate(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """The mean of both images' embeddings, in which the first has the weight `share`."""
    return torch.lerp(second, first, share)


COMPOSITIONS = {"join": join, "interpolate": interpolate}


@dataclass(frozen=True)
class Step:
    """How far a computation is. `text` is what it has written so far."""

    sentence: str
    done: int = 0
    total: int = 0
    text: str = ""

    def within(self, whole: str) -> "Step":
        """The same step of a part of something larger."""
        return replace(self, sentence=f"{self.sentence} ({whole})")


@dataclass(frozen=True)
class Caption:
    text: str
    tokens: int  # with the end-of-text token
    is_cut: bool  # by the longest length allowed


class Studio:
    """
    A model, and what visitors do with it.

    Its methods are generators: they yield a [`Step`] after each token and each sampling step, and stop when they are
    closed. What they compute is their return value.
    """

    def __init__(self, model: str):
        """`model`: folder or Hub id of a VLV."""
        device = _find_device()
        dtype = torch.float32 if device.type == "cpu" else "auto"
        self.name = Path(model).name if Path(model).is_dir() else model
        self.model = AutoModel.from_pretrained(model, trust_remote_code=True, dtype=dtype, use_safetensors=True)
        self.model = self.model.to(device).eval()
        self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        self.purpose = _purpose(model)
        self.files = PictureFiles(self.processor)

    @property
    def writes(self) -> bool:
        """Whether the model has a caption head."""
        return self.model.caption_head is not None

    @property
    def takes_prompts(self) -> bool:
        """Whether captions can be asked for in words. The code of older repos knows of no prompts."""
        return self.writes and getattr(self.processor, "takes_prompts", False)

    @property
    def styles(self) -> dict[str, str]:
        """The model's own prompts, by name."""
        return dict(self.processor.styles) if self.takes_prompts else {}

    @property
    def rebuilds(self) -> bool:
        """Whether the model has a decoder."""
        return self.model.config.decoder_config is not None

    @property
    def draws_words(self) -> bool:
        """Whether the decoder's own text encoder can read words, as it does in text-to-image models."""
        return self.rebuilds and self.processor.decoder_tokenizer is not None

    @property
    def queries(self) -> Setting:
        """How many of the leading caption embeddings are read."""
        number = self.model.config.num_queries
        return Setting("Queries", number, 1, number, 1, "fewer leading caption embeddings say less")

    @property
    def lengths(self) -> dict[str, Setting]:
        """The settings of a model that was trained for a choice of length. Others read all of their queries well."""
        return {"num_queries": self.queries} if getattr(self.model.config, "nested_queries", False) else {}

    # ---- what visitors do ----------------------------------------------------------------------------------

    def caption(
        self,
        pixel_values: torch.Tensor,
        max_new_tokens: int = 300,
        num_beams: int = 1,
        temperature: float = 0,
        num_captions: int = 1,
        prefix: str = "",
        seed: int = 0,
        num_queries: int | None = None,
        prompt: str = "",
        style: str = "",
        **wishes: Any,
    ) -> Generator[Step, None, list[Caption]]:
        """
        Captions of one image.

        Args:
            pixel_values: `(1, 3, H, W)`, from the processor.
            temperature: above 0, words are drawn.
            prefix: the beginning of the captions.
            seed: of what is drawn. The captions of one image are different draws.
            num_queries: read only so many of the leading caption embeddings; `None` for all.
            prompt: what the captions are asked to be; or `style`, the name of one of the model's own prompts.
            wishes: `words`, `trigger_words`, `caption_prefix`, `caption_suffix` and `clean_tags`, as `vlv caption` has
                them; empty for none.
        """
        settings = check_settings(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            temperature=temperature,
            num_captions=num_captions,
            seed=seed,
        )
        check_search(settings["num_beams"], settings["temperature"], settings["num_captions"])
        asked, length = self._check_wishes(prompt=prompt, style=style, **wishes), self._check_length(num_queries)
        return (
            yield from watch(
                lambda report: self._write(self._encode(pixel_values, length), report, prefix or "", asked, **settings)
            )
        )

    def reconstruct(
        self,
        pixel_values: torch.Tensor,
        num_inference_steps: int = 8,
        guidance_scale: float = 2,
        seed: int = 0,
        num_queries: int | None = None,
    ) -> Generator[Step, None, Image.Image]:
        """An image rebuilt from its caption embeddings alone, or from the leading ones of them."""
        sampling = check_settings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed)
        length = self._check_length(num_queries)
        return (yield from watch(lambda report: self._sample(self._encode(pixel_values, length), report, **sampling)))

    def compose(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        share: float = 0.5,
        num_inference_steps: int = 8,
        guidance_scale: float = 2,
        seed: int = 0,
        text: str = "",
        method: str = "join",
        with_caption: bool = False,
    ) -> Generator[Step, None, tuple[Image.Image, str]]:
        """
        A picture from the caption embeddings of two images, a share of each, and its caption.

        Args:
            first, second: `pixel_values` of the images, `(1, 3, H, W)`.
            share: how much of the embeddings is the first image's, 0 to 1.
            text: words for the picture, which take the place of the last embeddings.
            method: "join" takes the leading embeddings of each image, "interpolate" a weighted mean of them.
            with_caption: also write the caption of the joined embeddings; else it is empty.
        """
        (share,) = check_settings(share=share).values()
        if method not in COMPOSITIONS:
            raise refusal(f"There is no method {method!r} to compose images: give {' or '.join(COMPOSITIONS)}.")
        sampling = check_settings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed)

        def work(report: Report) -> tuple[Image.Image, str]:
            joined = COMPOSITIONS[method](self._encode(first), self._encode(second), share)
            picture = self._sample(joined, report, text.strip(), **sampling)
            caption = self._write(joined, report)[0].text if with_caption and self.writes else ""
            return picture, caption

        return (yield from watch(work))

    def draw(
        self, words: str, num_inference_steps: int = 8, guidance_scale: float = 2, seed: int = 0
    ) -> Generator[Step, None, Image.Image]:
        """A picture of words, which the decoder's own text encoder reads. Words beyond its positions are left out."""
        sampling = check_settings(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed)
        return (yield from watch(lambda report: self._sample(self._embed(words), report, **sampling)))

    # ---- the model -----------------------------------------------------------------------------------------

    def _check_wishes(self, **wishes: Any) -> Any:
        """What is asked of captions, checked by the processor; `None` for nothing. Raises `gr.Error`."""
        given = {name: value.strip() if isinstance(value, str) else value for name, value in wishes.items()}
        given = {name: value for name, value in given.items() if value}
        if not given:
            return None
        if not hasattr(self.processor, "wishes"):  # it comes from the model's repo
            raise refusal(f"The code of {self.name} is too old for {', '.join(given)}: leave it out.")
        try:
            return self.processor.wishes(**given)
        except ValueError as error:
            raise refusal(str(error)) from None

    def _check_length(self, num_queries: int | None) -> int | None:
        length = None if num_queries is None else self.queries.check(num_queries)
        return None if length == self.queries.maximum else length

    @torch.no_grad()
    def _encode(self, pixel_values: torch.Tensor, num_queries: int | None = None) -> torch.Tensor:
        asked = {} if num_queries is None else {"num_queries": num_queries}  # which the code of older repos lacks
        return self.model.encode(pixel_values.to(self.model.device), **asked)

    @torch.no_grad()
    def _embed(self, words: str) -> torch.Tensor:
        """Words as caption embeddings (1, Q, E): the word embeddings that the decoder was trained to read."""
        positions = self.model.config.text_encoder_config.max_position_embeddings
        ids = self.processor.decoder_tokenizer(
            words, padding="max_length", max_length=positions, truncation=True, return_tensors="pt"
        ).input_ids
        return self.model.embed_words(ids)

    def _write(
        self,
        caption_embeds: torch.Tensor,
        report: Report,
        prefix: str = "",
        wishes: Any = None,
        max_new_tokens: int = 300,
        num_beams: int = 1,
        temperature: float = 0,
        num_captions: int = 1,
        seed: int = 0,
    ) -> list[Caption]:
        tokenizer = self.processor.tokenizer
        wording = wishes and wishes.wording_for()
        streams = num_beams == num_captions == 1  # beam search has no final tokens until it ends
        streams = streams and (wording is None or wording.changes_nothing)
        prefix_ids = tokenizer(prefix.rstrip(), add_special_tokens=False).input_ids if prefix.strip() else []
        ends = self.model.generation_config.eos_token_id
        ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

        def text_of(ids: list[int]) -> str:
            return tokenizer.decode([*prefix_ids, *ids], skip_special_tokens=True).strip()

        beginning = text_of([])

        def report_tokens(ids: torch.LongTensor) -> None:
            count = ids.shape[1]
            # A letter of several tokens is not whole yet.
            text = text_of(ids[0].tolist()).rstrip("\ufffd") if streams else ""
            report(Step(f"Writing: {count} token{'s' if count > 1 else ''}", count, max_new_tokens, text))

        report(Step("Writing", 0, max_new_tokens))
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "seed": seed}
        before = {"prompt": wishes.prompt} if wishes and wishes.prompt else {}
        inputs = self.processor(text=prefix.rstrip(), **before) if before or prefix_ids else {}
        rows = self.model.generate(
            caption_embeds=caption_embeds,
            **inputs,
            logits_processor=LogitsProcessorList(wishes.limits([None], text_of, list(ends)) if wishes else []),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            num_return_sequences=num_captions,
            stopping_criteria=StoppingCriteriaList([ReportTokens(report_tokens)]),
            **sampling,
        ).tolist()
        captions = []
        for row in rows:
            end = next((place + 1 for place, token in enumerate(row) if token in ends), None)
            whole, part = text_of(row), self.processor.decode(row)  # which may clean what the model wrote
            space = " " if whole[len(beginning) :].startswith(" ") else ""
            text = f"{beginning}{space}{part}" if beginning else part
            text = wording.finish(text) if wording else text
            captions.append(Caption(text, end or len(row), end is None and len(row) >= max_new_tokens))
        return captions

    def _sample(
        self,
        caption_embeds: torch.Tensor,
        report: Report,
        text: str = "",
        *,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
    ) -> Image.Image:
        def report_step(model: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            sentence = f"Rebuilding: step {step + 1} of {num_inference_steps}"
            report(Step(sentence, step + 1, num_inference_steps))
            return tensors

        report(Step("Rebuilding", 0, num_inference_steps))
        try:
            return self.model.reconstruct(
                caption_embeds=caption_embeds,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=report_step,
                text=text or None,
                tokenizer=self.processor.decoder_tokenizer,
            )[0]
        except ValueError as error:  # words that the text encoder has no room for
            if text:
                raise refusal(f"Words: {error}") from None
            raise


def _find_device() -> torch.device:
    if torch.cuda.is_available():  # asked first, because this is what ZeroGPU answers before there is a GPU
        return torch.device("cuda")
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _purpose(model: str) -> str:
    """What the model's card says that it is for, or not for; empty where there is no such card."""
    card = Path(model) / "README.md"
    try:
        text = ModelCard.load(card if Path(model).is_dir() else model).text
    except (OSError, ValueError, HfHubHTTPError):
        return ""
    found = PURPOSE.search(text)
    return " ".join(found[1].split()) if found else ""
