"""Scores on a dataset of images: of captions, reconstructions, pictures drawn from captions, and answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from PIL import Image
from transformers import AutoConfig

from components_vlv import reading_part
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from prompts_vlv import takes_prompts
from vlv import find_bundled
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.evaluation.answering import ImageAnswerer
from vlv.evaluation.embedding import is_clip
from vlv.evaluation.images import EvaluationData
from vlv.evaluation.metrics import compute
from vlv.evaluation.pictures import decoder_tokenizer, draw, embed_captions, encode_images
from vlv.evaluation.questions import Answerer, Question, most_shots, questions_about, write_prompts
from vlv.evaluation.results import Measurement
from vlv.evaluation.scores import FAMILIES, JUDGE, REFERENCED
from vlv.evaluation.work import Work
from vlv.judging.judge import Judge
from vlv.judging.scores import NUM_DRAWS, missing_parts
from vlv.models.loading import find_device, load_autoencoder, load_captioner, read_config
from vlv.provenance import digest, fingerprint


@dataclass
class DatasetScorer:
    """
    Scores a VLV on the images of a dataset. Captions, pictures and answers take time to make, so they are kept in
    `work` and not made twice.

    Args:
        data: images and their captions.
        work: where captions, pictures and answers are kept.
        wanted: the scores to measure, each (family, name), from `find_scores`.
        model: folder or Hub id of the VLV; the bundled checkpoint by default.
        device: a torch device, or `"auto"`.
        batch_size: images, prompts or texts at once.
        seed: of the noise of pictures, and of the examples shown to the language model.
        max_new_tokens, num_beams: of captions.
        num_inference_steps: of every picture.
        guidance_scale: of reconstructions.
        guidance_scales: of pictures drawn from captions. All captions are drawn once at each scale.
        text_to_image: folder or id of the diffusers pipeline that draws captions; the model's own decoder by default.
        clip, sentence_encoder, feature_extractor, llm: folders or ids of the models that scores need.
        questions: a file for [`read_questions`]; `image` is the path of an image below the dataset's folder.
        shots: solved questions before each question.
        answer_from: `"caption"`, which `llm` reads, or `"image"`, from which the VLV itself answers.
    """

    data: EvaluationData
    work: Work
    wanted: Sequence[tuple[str, str]]
    model: str | None = None
    device: str = "auto"
    batch_size: int = 50
    seed: int = 0
    max_new_tokens: int = 300
    num_beams: int = 1
    num_inference_steps: int = 8
    guidance_scale: float = 2.0
    guidance_scales: Sequence[float] = (1.0, 2.0, 3.0, 4.0)
    text_to_image: str | None = None
    clip: str | None = None
    sentence_encoder: str | None = None
    feature_extractor: str | None = None
    questions: str | None = None
    llm: str | None = None
    shots: int = 0
    answer_from: str = "caption"

    def measure(self) -> dict[str, Measurement]:
        """
        The scores, by `family/dataset/score`. For pictures drawn from captions, the guidance follows the dataset's
        name.

        Raises:
            OSError, ValueError: before any work, when something that a score needs is missing or does not fit.
        """
        self.check()
        measures = {
            "captions": self._captions,
            "reconstruction": self._reconstruction,
            "caption_to_image": self._caption_to_image,
            "questions": self._questions,
        }
        metrics = {}
        for family, measure in measures.items():
            if family in self._families:
                metrics |= measure([name for other, name in self.wanted if other == family])
        return metrics

    # ---- what is needed ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises the errors of [`measure`] for missing things, without loading any weights."""
        scores = [FAMILIES[family][name] for family, name in self.wanted]
        for (family, name), score in zip(self.wanted, scores, strict=True):
            if len(self.data) < score.images:
                raise ValueError(
                    f"{family}/{name} is not defined on {len(self.data)} image: it needs {score.images} or more."
                )
        if any(score.metric in REFERENCED for score in scores):
            _ = self.data.references
        for option in dict.fromkeys(score.model for score in scores if getattr(self, score.model or "", None)):
            with reading_part(f"model of --{option}", getattr(self, option)):
                config = AutoConfig.from_pretrained(getattr(self, option))
                if option == "clip" and not is_clip(config):
                    raise ValueError(f"a {config.model_type} does not embed both images and texts; use a CLIP.")
        if "questions" in self._families and self.shots > most_shots(self._asked):
            raise ValueError(
                f"--shots {self.shots} asks for more examples than there are questions about other images: "
                f"{most_shots(self._asked)}."
            )
        if "caption_to_image" in self._families and self.text_to_image is not None:
            with reading_part("pipeline of --text_to_image", self.text_to_image):
                DiffusionPipeline.load_config(self.text_to_image)
        config = read_config(self._source)
        if self._answers and config.caption_config is not None and not takes_prompts(self._processor):
            raise ValueError(
                f"{self._source} takes no prompts and cannot answer questions about images: take --answer_from "
                "caption, or a --model that was trained with prompts."
            )
        if config.caption_config is None and self._families != {"reconstruction"}:
            raise ValueError(f"{self._source} has no caption head and cannot caption; choose another --model.")
        if self._judges and (missing := missing_parts(config, self._processor, self._source).get("explained")):
            raise ValueError(f"{missing}, so it cannot compute captions/explained: leave that score out.")
        if config.decoder_config is None and self._decodes:
            raise ValueError(f"{self._source} has no diffusion decoder and cannot draw; choose another --model.")

    # ---- families ------------------------------------------------------------------------------------------

    def _captions(self, names):
        def inputs(metric):
            if metric == "wording":
                return {"ended": [row["ended"] for row in self._written]}
            return {"references": self.data.references if metric in REFERENCED else self.data.images[:]}

        own = [name for name in names if FAMILIES["captions"][name].metric == JUDGE]
        others = [name for name in names if name not in own]
        metrics = self._measured("captions", self.data.name, others, self._texts, inputs)
        for name in own:
            values = [row[name] for row in self._judged(name)]
            metrics[f"captions/{self.data.name}/{name}"] = Measurement.of(values, len(values))
        return metrics

    def _judged(self, name: str) -> list[dict[str, Any]]:
        """A row for each image: the score of its caption by the model itself."""

        def score(start):
            judge = Judge(*self._vlv, [name], batch_size=self.batch_size)
            for first in range(start, len(self.data), self.batch_size):
                numbers = range(first, min(first + self.batch_size, len(self.data)))
                contents = [judge.read(self.data.load(number)) for number in numbers]
                for (scores,) in judge(contents, [[self._texts[number]] for number in numbers]):
                    yield scores

        settings = {"model": self._fingerprint, "images": self.data.fingerprint, "captions": digest(self._texts)}
        settings["num_draws"] = NUM_DRAWS
        return self.work.rows(name, settings, len(self.data), score)

    def _reconstruction(self, names):
        settings = {**self._sampling(self.guidance_scale), "images": self.data.fingerprint}

        def rebuild(start):
            def paint(numbers, generators):
                embeds = encode_images(*self._vlv, [self.data.load(number) for number in numbers])
                return self._reconstruct(embeds, self.guidance_scale, generators)

            return draw(paint, range(len(self.data)), self.batch_size, self.seed, start)

        pictures = self.work.pictures("reconstruction", settings, len(self.data), rebuild)
        with Image.open(pictures[0]) as picture:
            size = picture.size
        originals = self.work.pictures(
            "original",
            {"images": self.data.fingerprint, "crop": self._processor.crop, "size": size},
            len(self.data),
            lambda start: (self._seen(number, size) for number in range(start, len(self.data))),
        )
        return self._measured(
            "reconstruction", self.data.name, names, pictures, lambda metric: {"references": originals}
        )

    def _caption_to_image(self, names):
        metrics = {}
        for guidance_scale in self.guidance_scales:
            settings = {**self._sampling(guidance_scale), "captions": digest(self._texts)}
            if self.text_to_image is not None:
                settings["model"] = fingerprint(self.text_to_image)

            def draw_captions(start, guidance_scale=guidance_scale):
                paint = self._paint_captions(guidance_scale)
                return draw(paint, self._texts, self.batch_size, self.seed, start)

            pictures = self.work.pictures("caption_to_image", settings, len(self.data), draw_captions)
            metrics |= self._measured(
                "caption_to_image",
                f"{self.data.name} at guidance {guidance_scale:g}",
                names,
                pictures,
                lambda metric: {"references": self.data.images[:]},
            )
        return metrics

    def _questions(self, names):
        if self._answers:
            settings = {"model": self._fingerprint, "images": self.data.fingerprint}
            settings["questions"] = digest([repr(question) for question in self._asked])
            numbers = {name: number for number, name in enumerate(self.data.names)}

            def answers_from(start):
                answerer = ImageAnswerer(*self._vlv, self.batch_size)
                return answerer.answer(self._asked[start:], lambda name: self.data.load(numbers[name]))
        else:
            captions = dict(zip(self.data.names, self._texts, strict=True))
            prompts = write_prompts(self._asked, captions, self.shots, self.seed)
            settings = {"prompts": digest(prompts), "llm": fingerprint(self.llm)}

            def answers_from(start):
                answerer = Answerer(self.llm, str(self._device), self.batch_size)
                return answerer.answer(self._asked[start:], prompts[start:])

        def answer(start):
            for question, text in zip(self._asked[start:], answers_from(start), strict=True):
                yield {"image": question.image, "question": question.question, "answer": text}

        answers = self.work.rows("answers", settings, len(self._asked), answer)
        scores = compute(
            "answers",
            predictions=[row["answer"] for row in answers],
            references=[list(question.answers) for question in self._asked],
        )["accuracy"]
        # Questions about one image share its caption, so the image is the independent unit.
        images = {name: number for number, name in enumerate(dict.fromkeys(one.image for one in self._asked))}
        places = [images[question.image] for question in self._asked]
        accuracy = Measurement.share(np.bincount(places, scores), np.bincount(places))
        return {f"questions/{self.data.name}/{name}": accuracy for name in names}

    def _measured(
        self,
        family: str,
        images: str,
        names: Sequence[str],
        predictions: Sequence[str],
        inputs: Callable[[str], Mapping[str, Any]],
    ) -> dict[str, Measurement]:
        """`images`: the name of the images in the results; `inputs`: what a metric compares the predictions with."""
        computed, metrics = {}, {}
        for name in names:
            score = FAMILIES[family][name]
            how = (score.metric, score.model)
            if how not in computed:
                model = {}
                if score.model is not None:
                    model = {"model": getattr(self, score.model), "device": str(self._device)}
                    model["batch_size"] = self.batch_size
                computed[how] = compute(score.metric, predictions=predictions, **inputs(score.metric), **model)
            metrics[f"{family}/{images}/{name}"] = Measurement.of(computed[how][score.key], len(predictions))
        return metrics

    # ---- what families share -------------------------------------------------------------------------------

    @property
    def _families(self) -> set[str]:
        return {family for family, _ in self.wanted}

    @property
    def _answers(self) -> bool:
        """Whether the VLV itself answers questions."""
        return "questions" in self._families and self.answer_from == "image"

    @property
    def _draws_captions(self) -> bool:
        """Whether the model's own decoder draws the captions."""
        return "caption_to_image" in self._families and self.text_to_image is None

    @property
    def _decodes(self) -> bool:
        return "reconstruction" in self._families or self._draws_captions or self._judges

    @property
    def _judges(self) -> bool:
        """Whether the model scores its own captions."""
        return any(FAMILIES[family][name].metric == JUDGE for family, name in self.wanted)

    @cached_property
    def _written(self) -> list[dict[str, Any]]:
        """A row for each image: file_name, text, and whether the caption ended by itself."""
        settings = {
            "model": self._fingerprint,
            "images": self.data.fingerprint,
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
        }

        def write(start):
            decoding = Decoding(max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)
            captioner = Captioner(*self._vlv, decoding, self.batch_size)
            images = ((self.data.names[number], self.data.load(number)) for number in range(start, len(self.data)))
            for name, (best, *_) in captioner.caption_images(images):
                yield {"file_name": name, "text": best.text, "ended": best.ended}

        return self.work.rows("captions", settings, len(self.data), write)

    @property
    def _texts(self) -> list[str]:
        return [row["text"] for row in self._written]

    @cached_property
    def _asked(self) -> list[Question]:
        """The questions about the images that are measured on."""
        return questions_about(self.data, self.questions)

    def _sampling(self, guidance_scale: float) -> dict[str, Any]:
        return {
            "model": self._fingerprint,
            "seed": self.seed,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": guidance_scale,
        }

    def _seen(self, number: int, size: tuple[int, int]) -> Image.Image:
        """The part of an image that the model sees, resized to the size that the decoder rebuilds."""
        return self._processor.preprocess_image(self.data.load(number)).resize(size, Image.Resampling.BILINEAR)

    # ---- models --------------------------------------------------------------------------------------------

    @property
    def _source(self) -> str:
        return find_bundled(self.model)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._source)

    @cached_property
    def _device(self) -> torch.device:
        return find_device(self.device)

    @cached_property
    def _processor(self) -> VLVProcessor:
        return VLVProcessor.from_pretrained(self._source)

    @cached_property
    def _vlv(self) -> tuple[VLVModel, VLVProcessor]:
        """The model and its processor, loaded at first use. The decoder is loaded only if it is needed to draw."""
        model, processor = (load_autoencoder if self._decodes else load_captioner)(self._source, self.device)
        if self._draws_captions:
            decoder_tokenizer(processor)  # raises now, not after an hour of captioning
        return model, processor

    def _reconstruct(self, embeds, guidance_scale, generators):
        model, _ = self._vlv
        return model.reconstruct(
            caption_embeds=embeds,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
        )

    def _paint_captions(self, guidance_scale):
        if self.text_to_image is None:
            return lambda captions, generators: self._reconstruct(
                embed_captions(*self._vlv, captions), guidance_scale, generators
            )
        return lambda captions, generators: (
            self._pipeline(
                prompt=list(captions),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generators,
            ).images
        )

    @cached_property
    def _pipeline(self) -> DiffusionPipeline:
        dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        with reading_part("pipeline of --text_to_image", self.text_to_image):
            pipeline = AutoPipelineForText2Image.from_pretrained(self.text_to_image)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self._device, dtype)
