"""The scores of captions, as functions of the model, and the judge that computes them in batches."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.image_processor import VaeImageProcessor
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache

from layers_vlv import cast_for
from modeling_vlv import VLVModel
from processing_vlv import VLVProcessor
from vlv.captioning.batches import Batches
from vlv.captioning.engine import Prepared, begin_row, read_source
from vlv.captioning.journal import Row
from vlv.evaluation.embedding import Embedder
from vlv.evaluation.pictures import embed_captions
from vlv.judging.scores import NUM_DRAWS
from vlv.judging.windows import read_captions

Scores = dict[str, float]

# Noisier latents say where objects are and little else; docs/judging.md measures this on training scenes.
NOISIEST = 0.5  # of all timesteps
ALIKE = 32  # captions of about one length: few of their positions are padding
LOGITS_AT_ONCE = 2**27  # numbers: half a gigabyte in fp32


class Draws(NamedTuple):
    """Noise and timesteps that all captions share, so that a caption's loss differs from another's by the caption."""

    timesteps: torch.Tensor  # (D,) int64
    noise: torch.Tensor  # (D, C, h/f, w/f) float32

    @classmethod
    def of(cls, model: VLVModel, shape: Sequence[int], num_draws: int, seed: int, device: torch.device) -> "Draws":
        """`num_draws` timesteps in the middles of as many equal parts of the less noisy half. `shape`: of latents."""
        places = (torch.arange(num_draws) + 0.5) / num_draws
        timesteps = (places * NOISIEST * model.teacher.num_timesteps).long()
        noise = torch.randn(num_draws, *shape, generator=torch.Generator().manual_seed(seed))
        return cls(timesteps.to(device), noise.to(device))


@torch.no_grad()
def denoising_losses(model: VLVModel, latents: torch.Tensor, contexts: torch.Tensor, draws: Draws) -> torch.Tensor:
    """
    The teacher's loss (B,), a mean over the draws, of `latents` (B, C, h/f, w/f) from `contexts` (B, L, E): the mean
    squared error of its prediction (paper section 3.1), for each image.
    """
    teacher, latents = model.teacher, latents.float()
    total = latents.new_zeros(len(latents))
    for timestep, noise in zip(*draws, strict=True):
        timesteps, noise = timestep.expand(len(latents)), noise.expand_as(latents)
        prediction = model.denoise(teacher.add_noise(latents, noise, timesteps), timesteps, contexts).float()
        target = teacher.target(latents, noise, timesteps).to(prediction)
        total += (prediction - target).square().mean(dim=(1, 2, 3))
    return total / len(draws.timesteps)


def explained(
    model: VLVModel,
    latents: torch.Tensor,
    contexts: Sequence[torch.Tensor],
    empty: torch.Tensor,
    owners: torch.Tensor,
    draws: Draws,
    batch_size: int = 64,
) -> torch.Tensor:
    """
    How much of the teacher's denoising loss each caption removes, 1 - loss(caption) / loss(empty). 1 is all of it, 0
    is nothing, and a caption of another image can be below 0.

    Args:
        latents: `(B, C, h/f, w/f)`, from `model.encode_latents`.
        contexts: P of them, from [`read_captions`]; `empty`: that of the empty caption.
        owners: `(P,)`, the number of the image that each caption is of.
        batch_size: pairs at once.

    Returns:
        `(P,)` float32.
    """
    nothing = denoising_losses(model, latents, empty.expand(len(latents), -1, -1), draws)
    losses = nothing.new_empty(len(contexts))
    for length in {len(context) for context in contexts}:  # contexts of one batch have one length
        alike = [number for number, context in enumerate(contexts) if len(context) == length]
        for start in range(0, len(alike), batch_size):
            some = torch.tensor(alike[start : start + batch_size], device=latents.device)
            stacked = torch.stack([contexts[number] for number in some.tolist()])
            losses[some] = denoising_losses(model, latents[owners[some]], stacked, draws)
    nothing = nothing[owners]
    # Nothing is left to explain where the empty caption has no loss.
    return torch.where(nothing == 0, torch.zeros_like(losses), 1 - losses / nothing)


@torch.no_grad()
def likelihood(
    model: VLVModel,
    processor: VLVProcessor,
    caption_embeds: torch.Tensor,
    captions: Sequence[str],
    owners: torch.Tensor,
    batch_size: int = 64,
    prompts: Sequence[str] | None = None,
) -> torch.Tensor:
    """
    The caption head's mean log-probability of a caption's tokens and of its end, in nats per token: at most 0. It is
    the caption loss of stage 2 (paper section 3.2) for each caption, with the other sign. Of a caption that is longer
    than the caption head, the beginning counts.

    Args:
        caption_embeds: `(B, Q, E)`, from `model.encode`.
        captions, owners: P captions, and the numbers `(P,)` of the images that they are of.
        batch_size: pairs at once.
        prompts: B of them, which the caption head reads before the captions; "" for none.

    Returns:
        `(P,)` float32.
    """
    positions = getattr(model.config.caption_config, "max_position_embeddings", None)
    longest = None if positions is None else max(1, positions - caption_embeds.shape[1])
    asked = None if prompts is None else [prompts[owner] for owner in owners.tolist()]
    tokens = processor(text=list(captions), prompt=asked, return_labels=True)
    tokens = {name: ids[:, :longest] for name, ids in tokens.items()}
    lengths = tokens["attention_mask"].sum(1)  # all padding is on the right
    order = lengths.argsort()  # captions of similar length share a batch
    vocabulary = model.get_output_embeddings().weight.shape[0]
    size = max(1, min(batch_size, ALIKE, LOGITS_AT_ONCE // (vocabulary * int(lengths.max()))))
    prefix = ReadPrefix(model, caption_embeds)
    means = torch.empty(len(captions), device=owners.device)
    for some in order.split(size):
        length = int(lengths[some].max())
        ids, mask, labels = (
            tokens[name][some, :length].to(owners.device) for name in ("input_ids", "attention_mask", "labels")
        )
        some = some.to(owners.device)
        logits = prefix.logits(owners[some], ids, mask)
        chosen = logits.float().log_softmax(-1).gather(-1, ids[..., None].to(logits.device))[..., 0]
        counts = labels != -100
        means[some] = ((chosen.to(counts.device) * counts).sum(1) / counts.sum(1)).to(means)
    return means


class ReadPrefix:
    """Images as the caption head has read them: once, for all of their captions. `caption_embeds`: `(B, Q, E)`."""

    def __init__(self, model: VLVModel, caption_embeds: torch.Tensor):
        self.head = model.caption_head
        projection, dtype = model.prefix_projection, self.head.get_input_embeddings().weight.dtype
        inputs = projection(cast_for(projection, model.encode_context(caption_embeds))).to(dtype)
        cache = DynamicCache(config=self.head.config)
        self.first = self.head(inputs_embeds=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        self.cache, self.length = cache, inputs.shape[1]

    def logits(self, owners: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What predicts the tokens `ids` (P, T), padded on the right, of captions of the images `owners` (P,)."""
        cache = copy.deepcopy(self.cache)
        cache.batch_select_indices(owners)
        mask = torch.cat([mask.new_ones(len(mask), self.length), mask], dim=1)
        after = self.head(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        return torch.cat([self.first[owners].to(after.device), after[:, :-1]], dim=1)


@torch.no_grad()
def round_trip(
    model: VLVModel,
    processor: VLVProcessor,
    decoder_pixel_values: torch.Tensor,
    captions: Sequence[str],
    owners: torch.Tensor,
    embedder: Embedder,
    seed: int = 0,
) -> torch.Tensor:
    """
    The cosine, -1..1, between the features of an image and of the picture that the teacher draws from a caption. All
    pictures start from one noise. Of a long caption, the first window is drawn.

    Args:
        decoder_pixel_values: `(B, 3, h, w)` in -1..1: what the decoder sees of the images.
        captions, owners: as in [`likelihood`].

    Returns:
        `(P,)` float32.
    """
    pictures = model.reconstruct(
        caption_embeds=embed_captions(model, processor, captions),
        generator=[torch.Generator().manual_seed(seed) for _ in captions],
    )
    originals = VaeImageProcessor().postprocess(decoder_pixel_values.float().cpu(), output_type="pil")
    features = embedder.embed_images(originals)[owners.cpu()]
    return cosine_similarity(embedder.embed_images(pictures), features)


class Judge(Batches):
    """
    Scores captions of images: the one place that does, for `vlv score`, `vlv caption --best_of` and `vlv evaluate`.

    The image's latents and embeddings are computed once for all of its captions.

    Args:
        model, processor: a VLV with the parts that the scores need (see [`missing_parts`]).
        names: of the scores.
        num_draws, seed: of the noise that `explained` shares among all captions.
        embedder: the features of `round_trip`.
        batch_size: images at once (see [`Batches`]).
    """

    def __init__(
        self,
        model: VLVModel,
        processor: VLVProcessor,
        names: Sequence[str],
        num_draws: int = NUM_DRAWS,
        seed: int = 0,
        embedder: Embedder | None = None,
        batch_size: int | None = None,
    ):
        super().__init__(
            next(model.parameters()).device, batch_size, "leave out a score with --scores, or use --dtype bfloat16"
        )
        self.model, self.processor, self.names = model, processor, tuple(names)
        self.num_draws, self.seed, self.embedder = num_draws, seed, embedder
        self.read = partial(read_for_judge, processor, bool({"explained", "round_trip"} & set(names)))
        self._draws: Draws | None = None
        self._empty: torch.Tensor | None = None

    @property
    def can_draw(self) -> bool:
        """Whether the model draws pictures from captions."""
        return (
            self.model.teacher is not None
            and self.processor.decoder_tokenizer is not None
            and (self.model.text_encoder is not None)
        )

    def __call__(
        self,
        contents: Sequence[Mapping[str, torch.Tensor]],
        captions: Sequence[Sequence[str]],
        prompts: Sequence[str] | None = None,
    ) -> list[list[Scores]]:
        """
        The scores of each caption of each image.

        Args:
            contents: what `read` returns for the images; `caption_embeds` (Q, E) take the place of `pixel_values`.
            captions: at least one for each image.
            prompts: what the captions of each image were asked to be, for `likelihood`; "" for nothing.

        Raises:
            ValueError: when not even one image fits into memory.
        """
        return self.in_batches(self._score, contents, captions, prompts or [""] * len(contents))

    def rows(self, batch: Sequence[Prepared]) -> list[Row]:
        """The rows of a batch: captions and their scores, or errors. An image with several captions has lists."""
        readable = [prepared for prepared in batch if prepared.error is None]
        found = iter(
            self([prepared.content for prepared in readable], [prepared.picture.captions for prepared in readable])
        )
        return [_row(prepared, None if prepared.error else next(found), self.names) for prepared in batch]

    @torch.no_grad()
    def _score(self, contents, captions, prompts):
        flat = [caption for texts in captions for caption in texts]
        counts = list(map(len, captions))
        owners = torch.arange(len(captions), device=self.device).repeat_interleave(
            torch.tensor(counts).to(self.device)
        )
        columns = {name: list(self._computed(name, contents, flat, owners, prompts).tolist()) for name in self.names}
        rows: Iterator[Scores] = iter(
            dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
        )
        return [[next(rows) for _ in range(count)] for count in counts]

    def _computed(self, name, contents, captions, owners, prompts):
        if name == "explained":
            latents = self.model.encode_latents(_stacked(contents, "decoder_pixel_values"), sample=False)
            tokenizer = self.processor.decoder_tokenizer
            if self._draws is None or self._empty is None:
                self._draws = Draws.of(self.model, latents.shape[1:], self.num_draws, self.seed, latents.device)
                (self._empty,) = read_captions(self.model, tokenizer, [""])
            contexts = read_captions(self.model, tokenizer, captions)
            return explained(self.model, latents, contexts, self._empty, owners, self._draws, self.largest)
        if name == "likelihood":
            if "caption_embeds" in contents[0]:
                embeds = _stacked(contents, "caption_embeds")
            else:
                embeds = self.model.encode(_stacked(contents, "pixel_values"))
            return likelihood(self.model, self.processor, embeds, captions, owners, self.largest, prompts)
        pixels = _stacked(contents, "decoder_pixel_values")
        return round_trip(self.model, self.processor, pixels, captions, owners, self.embedder, self.seed)


def read_for_judge(processor: VLVProcessor, for_decoder: bool, source: Any) -> dict[str, torch.Tensor]:
    """What the judge needs of an image: `pixel_values` (3, H, W), and `decoder_pixel_values` (3, h, w) if wanted."""
    inputs = processor(images=read_source(source), return_decoder_pixel_values=for_decoder)
    return {name: value[0] for name, value in inputs.items()}


def _stacked(contents, name):
    return torch.stack([content[name] for content in contents])


def _row(prepared, found, names):
    row = begin_row(prepared.picture)
    if found is None:
        return {**row, "error": prepared.error}
    if not all(math.isfinite(value) for scores in found for value in scores.values()):
        error = f"{prepared.picture.name}: the model's numbers are not finite; use --dtype float32."
        return {**row, "error": error}
    several = len(found) > 1
    row["text"] = list(prepared.picture.captions) if several else prepared.picture.captions[0]
    for name in names:
        values = [round(scores[name], 6) for scores in found]
        row[name] = values if several else values[0]
    return row
