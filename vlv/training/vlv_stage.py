"""What the two stages that train a VLV share: settings, cached inputs, and saving the whole model."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from PIL.Image import Image
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from modeling_vlv import STAGES, VLVModel
from processing_vlv import VLVProcessor
from vlv import find_bundled
from vlv.data.rows import image_digest, open_image, read_captions, require_column
from vlv.models.loading import load_weights, read_config
from vlv.reading import Reader
from vlv.training.average import MovingAverage
from vlv.training.cache import Images, as_tensors, cache_files, compute_blank, free_bytes, missing_bytes
from vlv.training.caching import Cost, choose, times_seen
from vlv.training.checks import groups_by_length, require_a_batch
from vlv.training.examples import Examples, Stream, merge
from vlv.training.sharding import asks_to_shard
from vlv.training.stage import Stage
from vlv.training.vlv_settings import VLVSettings

VISION_PARTS = ("vision_tower", "image_projection")
FLORENCES_PARTS = (*VISION_PARTS, "language_model", "word_embeddings")
ENCODER_PARTS = (*FLORENCES_PARTS, "queries", "projection")
# What frozen parts can compute once for an image, and the processor's tensor that they compute it from.
COMPUTED_FROM = {
    "image_features": "pixel_values",
    "caption_embeds": "pixel_values",
    "latents": "decoder_pixel_values",
    "latent_mean": "decoder_pixel_values",
    "latent_std": "decoder_pixel_values",
}


def process(image: Image, processor: VLVProcessor, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The processor's tensors of one image that are among `names`."""
    if not names:
        return {}
    inputs = processor(images=image, return_decoder_pixel_values="decoder_pixel_values" in names)
    return {name: inputs[name][0] for name in names}


def read_tensors(source: Any, processor: VLVProcessor, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The image of a row as the tensors called `names`."""
    return process(open_image(source), processor, names)


def read_row(
    row: dict[str, Any],
    read: Callable[[Any], dict[str, torch.Tensor]],
    image_column: str,
    caption_column: str | None,
    prompt_column: str | None = None,
    check_prompts: Callable[[list[str]], None] | None = None,
) -> dict[str, Any]:
    """
    One row as a sample: its captions, if there is a column of them, their prompts, and the tensors of its image from
    `read`.
    """
    captions = {} if caption_column is None else read_captions(row, caption_column, prompt_column)
    if check_prompts is not None and "prompts" in captions:
        check_prompts(captions["prompts"])
    return {**captions, **read(row.get(image_column))}


def _read_nothing(source: Any) -> dict[str, torch.Tensor]:
    return {}


class VLVStage(Stage):
    """A stage that trains a VLV. The output of frozen parts for an image can be computed once and kept on disk.

    A subclass loads `model` and `processor`, then calls `choose_parts`, then `prepare_data`.
    """

    stage: str
    image_inputs: tuple[str, ...]  # the processor's tensors of an image that the model needs
    unreached: tuple[str, ...] = ()  # parts that the loss does not depend on, so that they cannot train
    reads_captions = False
    prompt_column: str | None = None  # with the prompts of captions, if the dataset has one
    eval_rows: Dataset
    model: VLVModel
    processor: VLVProcessor
    average: MovingAverage | None = None

    def __init__(self, settings: VLVSettings, args: TrainingArguments):
        super().__init__(settings, args)
        if settings.average_decay is not None and asks_to_shard(args):
            raise ValueError(
                "average_decay needs whole weights, which FSDP and DeepSpeed shard: leave it out, or train with DDP."
            )
        if settings.streaming and groups_by_length(args):
            raise ValueError(
                "group_by_length needs the lengths of all captions, which streaming does not know: leave out"
                " streaming, or set train_sampling_strategy to random."
            )
        if settings.save_dtype is not None and not isinstance(getattr(torch, settings.save_dtype, None), torch.dtype):
            raise ValueError(f"save_dtype is {settings.save_dtype!r}: name a torch dtype, e.g. float16.")
        self.source = settings.model and find_bundled(settings.model)

    def load_model(self, model_class: type[VLVModel], new: tuple[str, ...] = (), **config: Any) -> VLVModel:
        """
        The model to start from, in fp32, because weights that train need that precision.

        Args:
            new: see `load_weights`.
            config: overrides the checkpoint's config.
        """
        read_config(self.source)  # raises one sentence if it is not a VLV
        attention = self.settings.attn_implementation
        return load_weights(
            model_class, self.source, new, dtype=torch.float32, attn_implementation=attention, **config
        )

    def choose_parts(self) -> None:
        """Sets which parts train and which are frozen. No other code does."""
        settings = self.settings
        self.model.config.nested_queries = settings.nested_queries
        if settings.train_parts == []:
            raise ValueError("train_parts is empty, so nothing would train: name parts, or leave the setting out.")
        self.train_parts = set(settings.train_parts or STAGES[self.stage])
        if unreached := sorted(self.train_parts & set(self.unreached)):
            raise ValueError(
                f"train_parts names {', '.join(unreached)}, which the loss of stage '{self.stage}' does not reach:"
                " leave it out."
            )
        try:
            self.model.set_stage(self.stage, train=tuple(self.train_parts))
        except ValueError as error:
            raise ValueError(f"{self.source or 'The model'}: {error}") from error
        if settings.encoder_learning_rate is not None and not self.trains(FLORENCES_PARTS):
            raise ValueError(
                f"encoder_learning_rate is set, but no part of Florence-2 trains, only"
                f" {', '.join(sorted(self.train_parts))}: name language_model or another of its parts in train_parts."
            )
        if settings.gradient_checkpointing_parts is not None:
            parts = ("encoder", "unet", "transformer", "caption_head")
            known = [name for name in parts if getattr(self.model, name) is not None]
            if unknown := set(settings.gradient_checkpointing_parts) - set(known):
                raise ValueError(
                    f"gradient_checkpointing_parts can be {', '.join(known)} in this stage, not {', '.join(unknown)}."
                )
            self.model.gradient_checkpointing_enable(parts=settings.gradient_checkpointing_parts)

    def callbacks(self) -> list[TrainerCallback]:
        decay = self.settings.average_decay
        if decay is None:
            return super().callbacks()
        trained = self.trained().values()
        self.average = MovingAverage(trained, [weight.detach().clone() for weight in trained], decay)
        return [*super().callbacks(), self.average]

    def state(self) -> dict[str, torch.Tensor]:
        state = super().state()
        if self.average is None:
            return state
        return state | {f"average.{name}": mean for name, mean in zip(state, self.average.average, strict=True)}

    def finish(self) -> None:
        if self.average is not None:
            self.average.take()

    def learning_rates(self) -> dict[nn.Parameter, float]:
        rate = self.settings.encoder_learning_rate
        return {} if rate is None else dict.fromkeys(self.model.encoder.parameters(), rate)

    def prepare_data(
        self,
        train: Mapping[str, Collection[str]],
        evaluation: Mapping[str, Collection[str]],
        besides: Collection[str] = (),
    ) -> None:
        """
        Loads the data.

        Args:
            train, evaluation: for each setting that switches a cache, the tensors that it keeps (see COMPUTED_FROM),
                the smallest first; none if the parts that would compute them train.
            besides: the tensors that are always kept for the images to evaluate on.
        """
        settings, args = self.settings, self.args
        if settings.streaming and args.max_steps <= 0:
            raise ValueError("streaming needs max_steps, because the length of the data is not known beforehand.")
        train_rows, eval_rows = self.load_data(settings.streaming)
        require_column(eval_rows, settings.image_column, "image_column")
        self.find_prompts(train_rows, eval_rows)
        if self.reads_captions:
            eval_rows = self.captioned(eval_rows)
            train_rows = train_rows if settings.streaming else self.captioned(train_rows)
        if not settings.streaming:
            require_column(train_rows, settings.image_column, "image_column")
            require_a_batch(len(train_rows), settings, args)
        for name, tensors in train.items():
            if getattr(settings, name) and (settings.streaming or not tensors):
                reason = "the rows are streamed" if settings.streaming else "the parts that would compute it train"
                self.tell(f"{name}: off, because {reason}.")

        computed = [*self.choose_cached(eval_rows, evaluation, besides), *besides]
        self.eval_rows, self.eval_dataset = self.examples(eval_rows, computed, "Encoding evaluation images", True)
        if settings.streaming:
            self.train_dataset = self.stream(train_rows)
        else:
            computed = self.choose_cached(train_rows, train, seen=times_seen(len(train_rows), args))
            _, self.train_dataset = self.examples(train_rows, computed, "Encoding images", bool(computed))

    def choose_cached(
        self,
        rows: Dataset,
        cacheable: Mapping[str, Collection[str]],
        besides: Collection[str] = (),
        seen: float | None = None,
    ) -> list[str]:
        """
        The tensors to compute once for the images in `rows`, without `besides`, which are always computed. Evaluation
        images are used at least twice; `seen` is not given for them.
        """

        def cost(names: tuple[str, ...]) -> Cost:
            computed = [*(tensor for name in names for tensor in cacheable[name]), *besides]
            read, compute, key = self.once(computed)
            files = cache_files(rows, self.settings.image_column, key, self.cache_folder)
            blank = compute_blank(Images(rows, self.settings.image_column, read), compute)
            return Cost(missing_bytes(len(rows), files, blank), free_bytes(self.cache_folder))

        switches = {name: getattr(self.settings, name) for name, tensors in cacheable.items() if tensors}
        chosen = [choose(switches, 2 if seen is None else seen, cost)]
        broadcast_object_list(chosen)  # free disk space may change while the processes look at it
        for name, (on, reason) in chosen[0].items():
            if reason and seen is not None:
                self.tell(f"{name}: {'on' if on else 'off'}, because {reason}.")
        return [tensor for name, (on, _) in chosen[0].items() if on for tensor in cacheable[name]]

    def once(self, computed: Collection[str]) -> tuple[Callable, Callable, list[Any]]:
        """The arguments `read`, `compute` and `key` of `compute_once` for these tensors."""
        sources = sorted({COMPUTED_FROM[name] for name in computed})
        read = partial(process, processor=self.processor, names=sources)
        return read, partial(self.compute, names=computed), self.cache_key(computed)

    def examples(
        self, rows: Dataset, computed: Collection[str], description: str, read_first: bool
    ) -> tuple[Dataset, Examples]:
        """
        The rows that can be used, and the same rows as samples. The tensors in `computed` are computed here. Without
        `read_first`, images that cannot be read are left out during training.
        """
        if read_first:
            rows, cached = self.read_once(rows, *self.once(computed), description)
        sources = {COMPUTED_FROM[name] for name in computed}
        names = [name for name in self.image_inputs if name not in sources]
        columns = [
            *([self.settings.image_column] if names else []),
            *([self.settings.caption_column] if self.reads_captions else []),
            *([self.prompt_column] if self.prompt_column in rows.column_names else []),
        ]
        return rows, Examples(
            rows.select_columns(columns) if columns else rows,  # without columns it would have no length
            self.reader(names) if columns else None,
            [as_tensors(cached)] if computed else [],
            self.args.seed,
            self.left_out.add,
        )

    def stream(self, rows: IterableDataset) -> Stream:
        """Streamed rows, without the rows that evaluation took from the same split."""
        settings = self.settings
        require_column(rows, settings.image_column, "image_column")
        if self.reads_captions:
            require_column(rows, settings.caption_column, "caption_column")
        same = not (settings.eval_dataset or settings.eval_split)
        return Stream(
            rows,
            self.reader(self.image_inputs),
            self.left_out.add,
            settings.image_column,
            {image_digest(source) for source in self.eval_rows[settings.image_column]} if same else set(),
            self.args.seed,
            settings.shuffle_buffer_size,
            self.args.process_index,
            self.args.world_size,
        )

    def reader(self, names: Collection[str]) -> partial:
        """
        Makes samples of rows (see `read_row`). Each process reads images in another process, so that a damaged image
        cannot end the training.
        """
        read = partial(read_tensors, processor=self.processor, names=names)
        return partial(
            read_row,
            read=Reader(read) if names else _read_nothing,
            image_column=self.settings.image_column,
            caption_column=self.settings.caption_column if self.reads_captions else None,
            prompt_column=self.prompt_column,
            check_prompts=self.check_prompts,
        )

    def find_prompts(self, *datasets: Dataset | IterableDataset) -> None:
        """Sets `prompt_column` where the stage reads prompts and the data have some."""

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises ValueError for prompts of a row that cannot be trained on."""

    def features(self) -> tuple[str, ...]:
        """What the frozen parts of the encoder can compute once for an image."""
        if self.trains(VISION_PARTS):
            return ()
        return ("image_features",) if self.trains(ENCODER_PARTS) else ("caption_embeds",)

    def trains(self, names: Collection[str]) -> bool:
        """Whether any of the parts trains, itself or through adapters."""
        parts = self.parts()
        return any(weight.requires_grad for name in names for weight in parts[name].parameters())

    @torch.no_grad()  # in inference mode, the weights that this moves to the GPU could not be trained afterwards
    def compute(self, batch: dict[str, torch.Tensor], names: Collection[str]) -> dict[str, torch.Tensor]:
        """
        The tensors called `names`, computed from `pixel_values` and `decoder_pixel_values`. When training runs in half
        precision, they are computed in it and kept in fp16, whose 11 bits of precision also hold bf16's 8.
        """
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        model, found = self.model.eval(), {}
        for part in filter(None, (model.encoder, model.projection, model.vae)):
            part.to(self.args.device)  # only these: FSDP shards the others later, and they may not fit on one device
        with torch.autocast(self.args.device.type, half, enabled=half is not None):
            if "image_features" in names:
                found["image_features"] = model.get_image_features(batch["pixel_values"])
            if "caption_embeds" in names:
                found["caption_embeds"] = model.encode(batch["pixel_values"])
            if "decoder_pixel_values" in batch:
                latents = model.latent_distribution(batch["decoder_pixel_values"])
                found |= dict(zip(("latent_mean", "latent_std"), latents, strict=True))
                found["latents"] = found["latent_mean"]
        return {name: found[name].to(torch.float32 if half is None else torch.float16) for name in names}

    def cache_key(self, computed: Collection[str]) -> list[Any]:
        """All that the result of `compute` depends on: settings, and the weights of the parts that it uses."""
        config, parts = self.model.config, self.parts()
        sources = {COMPUTED_FROM[name] for name in computed}
        processor = self.processor.to_dict()
        for name in ("takes_prompts", "styles"):  # no image depends on them
            processor.pop(name, None)
        key = [sorted(computed), processor, self.args.bf16, self.args.fp16]
        if "pixel_values" in sources:
            names = ENCODER_PARTS if "caption_embeds" in computed else VISION_PARTS
            key += [config.encoder_config.to_dict(), config.prompt_ids, *(parts[name] for name in names)]
        if "decoder_pixel_values" in sources:
            key += [config.decoder_config["vae"], parts["vae"]]
        return key

    def collate(self, batch: dict[str, Any] | list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The tensors of a batch. A stream gives a list of single samples."""
        batch = batch if isinstance(batch, dict) else merge(batch)
        return {name: values for name, values in batch.items() if isinstance(values, torch.Tensor)}

    def parts(self) -> dict[str, nn.Module]:
        parts = {name: part for name, part in self.model.named_parts() if part is not None}
        return {
            name: nn.ParameterList([part]) if isinstance(part, nn.Parameter) else part for name, part in parts.items()
        }

    def sample_rows(self, count: int = 12) -> tuple[list[dict], list[Image], torch.Tensor]:
        """A few evaluation rows, the part of their images that the model sees, and its `pixel_values`."""
        rows = list(islice(self.eval_rows, count))
        images = [self.processor.preprocess_image(open_image(row[self.settings.image_column])) for row in rows]
        return rows, images, self.processor(images=images)["pixel_values"]

    def whole(self) -> VLVModel:
        """The whole model, with the parts that this stage did not load."""
        return self.model

    def save(self, folder: Path) -> None:
        model = self.whole()
        if self.settings.save_dtype is not None:
            model = model.to(getattr(torch, self.settings.save_dtype))
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
