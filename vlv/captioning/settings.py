"""The options of `vlv caption`, in groups. This module does not import torch."""

import os
from dataclasses import dataclass, field
from typing import Any

from vlv import BUNDLED
from vlv.arguments import check_seed
from wording_vlv import parse_words

# What is asked of captions, in the interface of OpenAI as well.
WISHES = ("prompt", "style", "words", "trigger_words", "caption_prefix", "caption_suffix", "clean_tags")


def option(default: Any, help_text: str, **argparse: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **argparse})


@dataclass(frozen=True)
class Decoding:
    """How captions are written."""

    _argument_group_name = "the captions"

    max_new_tokens: int = option(300, "Longest caption, in tokens.")
    min_new_tokens: int = option(0, "Shortest caption, in tokens.")
    num_beams: int = option(1, "Beams of the search; 1 is greedy, the paper uses 4.")
    temperature: float = option(
        0.0,
        "0 takes the likeliest token. Above 0, each token is drawn at random, and higher values give more varied "
        "captions. A caption depends on --seed and on the image's name, not on the other images.",
    )
    top_p: float = option(1.0, "Draw only among the likeliest tokens that together have this probability.")
    seed: int = option(0, "Seed of the draws (with --temperature).")
    num_captions: int = option(
        1,
        "Captions per image: the best ones of --num_beams, or as many draws. The image is encoded once. "
        "With more than 1, text is a list.",
    )
    best_of: str | None = option(
        None,
        "Keep the best of --num_captions. explained: the one that explains most of the image to the decoder; "
        "likelihood: the likeliest one; both: by the mean of the two (vlv score --help says what they are). Without "
        "--num_beams and --temperature the captions are drawn at temperature 1.",
        choices=["explained", "likelihood", "both"],
    )
    prefix: str | None = option(
        None, 'Beginning of every caption, which the model continues, such as "A watercolour of".'
    )
    prompt: str | None = option(
        None,
        'What the captions are asked to be, in words, such as "Describe it briefly." or a question. It needs a model '
        "that was trained with prompts.",
    )
    style: str | None = option(None, "The name of one of the model's own prompts instead (vlv info MODEL lists them).")
    words: str | None = option(
        None,
        "How many words a caption has, such as 20-40. A model that was taught to is asked for it; any other may not "
        "end a caption before, and the caption is cut where a sentence ends.",
        metavar="LEAST-MOST",
    )
    trigger_words: str | None = option(
        None, "Words, with commas between them, that come first in each caption that lacks them.", metavar="WORDS"
    )
    caption_prefix: str | None = option(
        None, "Text at the beginning of each caption. Unlike --prefix, the model does not read it."
    )
    caption_suffix: str | None = option(None, "Text at the end of each caption.")
    clean_tags: bool = option(False, "The captions are tags with commas between them: keep each tag once, in order.")
    force_words: list[str] | None = option(
        None,
        "Words that every caption must contain. A missing word is added where the caption would have ended, and the "
        "model continues from there.",
        metavar="WORD",
    )
    ban_words: list[str] | None = option(None, "Words that no caption may contain.", metavar="WORD")
    repetition_penalty: float | None = option(
        None, "Above 1, tokens that a caption already has become less likely; 1.1 is mild (default: the model's own)."
    )
    num_queries: int | None = option(
        None,
        "Read only so many of the leading caption embeddings, for a model that was trained with nested_queries "
        "(default: all).",
    )
    no_repeat_ngram_size: int = option(0, "A sequence of this many tokens may occur only once; 0 allows all.")

    def __post_init__(self):
        for name in ("max_new_tokens", "num_beams", "num_captions"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_queries is not None and self.num_queries < 1:
            raise ValueError(f"--num_queries is {self.num_queries}; it must be at least 1.")
        for name in ("min_new_tokens", "temperature", "no_repeat_ngram_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 0.")
        check_seed(self.seed)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise ValueError(f"--repetition_penalty is {self.repetition_penalty}; it must be above 0.")
        if self.prompt and self.style:
            raise ValueError("--prompt and --style both say what the captions are to be: choose one.")
        if self.words is not None:
            parse_words(self.words)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"--min_new_tokens {self.min_new_tokens} is more than --max_new_tokens.")
        if self.best_of is not None:
            if self.num_captions == 1:
                raise ValueError(f"--best_of {self.best_of} needs several captions to choose from: --num_captions 8.")
            if self.temperature == 0 and self.num_beams == 1:
                object.__setattr__(self, "temperature", 1.0)
        if self.temperature > 0 and self.num_beams > 1:
            raise ValueError("--temperature draws captions and --num_beams searches for the likeliest: choose one.")
        if self.temperature == 0 and self.num_captions > self.num_beams:
            raise ValueError(
                f"--num_captions {self.num_captions} needs as many --num_beams, or a --temperature above 0."
            )

    @property
    def wishes(self) -> dict[str, Any]:
        """The arguments of `wording_vlv.Wishes`."""
        return {name: getattr(self, name) for name in WISHES}

    @property
    def writes_several(self) -> bool:
        """Whether an image ends up with several captions."""
        return self.num_captions > 1 and self.best_of is None


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where and how."""

    _argument_group_name = "the model"

    model: str | None = option(None, f"Folder or Hub id of a VLV (default: the bundled {BUNDLED}, for drawn scenes).")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the accelerator.")
    device_map: str | None = option(
        None, "auto: spread a model that is too large for one device over all devices and the host's memory."
    )
    dtype: str = option(
        "auto", "float32, bfloat16 or float16; auto is float32 on the CPU, and the saved dtype on other devices."
    )
    quantization: str | None = option(
        None,
        "Keep the language model's weights in 8 or in 4 bits; needs bitsandbytes.",
        choices=["8bit", "4bit"],
    )
    attn_implementation: str | None = option(
        None, "sdpa, flash_attention_2 or eager (default: the best one available, mostly sdpa)."
    )
    compile: bool = option(
        False,
        "Decode with a static cache, which transformers compiles on a GPU. That takes a minute at the start and helps "
        "with large collections. On a CPU nothing is compiled.",
    )

    def __post_init__(self):
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {self.dtype} is unknown: choose auto, float32, bfloat16 or float16.")


def model_name(model: str | None) -> str:
    """A model's name that is the same wherever a command is run."""
    if model is None:
        return BUNDLED
    return os.path.realpath(model) if os.path.isdir(model) else model


@dataclass(frozen=True)
class RowOptions:
    """How the rows of tables are read. Image files have no rows."""

    _argument_group_name = "rows of parquet files, archives and datasets (image files have none)"

    split: str = option("train", "Split of a dataset from the Hub.")
    image_column: str | None = option(None, "Column of the images (default: the column of type Image, or image).")
    prompt_column: str | None = option(
        None,
        "Column with a prompt for each row. A row without one gets that of --prompt or --style, if there is any.",
    )
    id_column: str | None = option(None, "Column that names the rows (default: the file and the row's number or key).")
