"""Questions about images that a VLV answers itself. It must have been trained with prompts."""

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image

from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.captioning.captioner import Captioner
from vlv.captioning.settings import Decoding
from vlv.evaluation.pictures import encode_images
from vlv.evaluation.questions import MAX_NEW_TOKENS, Question


class ImageAnswerer:
    """
    Answers each question from its image: the question is the prompt. As for [`Answerer`], the answer to a
    multiple-choice question is the choice whose tokens have the highest mean likelihood after the prompt, and the
    answer to another question is what greedy search writes.

    Args:
        model, processor: a captioner that takes prompts.
        batch_size: questions at once.
    """

    def __init__(self, model: VLVModel, processor: VLVProcessor, batch_size: int = 50):
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.captioner = Captioner(model, processor, Decoding(max_new_tokens=MAX_NEW_TOKENS), batch_size)

    def answer(self, questions: Sequence[Question], load: Callable[[str], Image.Image]) -> Iterator[str]:
        """
        The answer to each question, in order.

        Args:
            load: the name of an image -> the image.

        Raises:
            ValueError: the checkpoint takes no prompts, or a question is too long for it.
        """
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            for question in batch:
                self.captioner.check_prompt(question.question)
            names = list(dict.fromkeys(question.image for question in batch))
            embeds = encode_images(self.model, self.processor, [load(name) for name in names])
            embeds = embeds[[names.index(question.image) for question in batch]]
            chosen = iter(self._choose(*self._part(batch, embeds, True)))
            written = iter(self._write(*self._part(batch, embeds, False)))
            yield from (next(chosen) if question.choices else next(written) for question in batch)

    def _part(self, batch, embeds, multiple_choice):
        places = [number for number, question in enumerate(batch) if bool(question.choices) == multiple_choice]
        return [batch[place] for place in places], embeds[places]

    def _write(self, questions, embeds):
        if not questions:
            return []
        prompts = [question.question for question in questions]
        return [best.text for best, *_ in self.captioner.write(prompts, embeds, prompts)]

    @torch.inference_mode()
    def _choose(self, questions, embeds):
        pairs = [(number, choice) for number, question in enumerate(questions) for choice in question.choices]
        scores = []
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            scores += self._likelihoods(questions, embeds[[number for number, _ in batch]], batch)
        best = []
        for question in questions:
            own, scores = scores[: len(question.choices)], scores[len(question.choices) :]
            best.append(question.choices[max(range(len(own)), key=own.__getitem__)])
        return best

    def _likelihoods(self, questions, embeds, pairs):
        """The mean log-probability of each choice's tokens after the question."""
        inputs = self.processor(
            text=[choice for _, choice in pairs],
            prompt=[questions[number].question for number, _ in pairs],
            return_labels=True,
        ).to(embeds.device)
        labels = inputs.pop("labels")
        ends = labels.new_tensor([row.nonzero()[-1] for row in labels.ne(-100)])  # the end-of-text tokens
        labels.scatter_(1, ends[:, None], -100)
        logits = self.model(caption_embeds=embeds, **inputs).logits[:, :-1]
        chances = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        chosen = labels.ne(-100)
        return (chances.masked_fill(~chosen, 0).sum(1) / chosen.sum(1)).tolist()
