"""The settings that the two stages of a VLV share."""

from dataclasses import dataclass, field

from vlv.training.caching import AUTO, parse_switch
from vlv.training.stage import Settings


@dataclass
class VLVSettings(Settings):
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the VLV to start from, or vlv-emoji or vlv-tiny."}
    )
    train_parts: list[str] | None = field(
        default=None, metadata={"help": "Parts to train instead of the stage's own (see VLVModel.set_stage)."}
    )
    encoder_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of Florence-2's own parts (language_model, ...), if they train. At the new parts'"
            " learning rate they lose their pretraining (default: learning_rate)."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, ... (default: the best that is installed)."}
    )
    gradient_checkpointing_parts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts that save memory with a second forward pass: encoder, unet or transformer (the teacher's),"
            " caption_head (--gradient_checkpointing: all of them)."
        },
    )
    cache_features: str = field(
        default=AUTO,
        metadata={
            "help": "Run the frozen vision tower (and other frozen parts of the encoder) once on each image, before"
            " training, and keep the result on disk: true, false, or auto, which does it if each image is used more"
            " than once and the cache takes at most half of the free disk space. At the published size it takes 1.2 MB"
            " per image in bf16 training.",
            "nargs": "?",
            "const": True,
        },
    )
    nested_queries: bool = field(
        default=False,
        metadata={
            "help": "Train half of the steps with a random number of the leading queries, so that the model captions"
            " and rebuilds with any number of them (num_queries)."
        },
    )
    average_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay, such as 0.999, of an exponential moving average of the weights, which is saved in place of"
            " the last step's (default: none). Evaluations during training measure the weights of their step."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the dataset from its source while training, for datasets that are larger than the disk."
            " Needs max_steps, because the length is not known. The images to train on are not cached."
        },
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={
            "help": "With streaming: rows to read ahead; the next row is drawn from them. Files are shuffled too."
        },
    )
    save_dtype: str | None = field(
        default=None, metadata={"help": "Precision of the final weights, e.g. float16 (default: as trained)."}
    )

    def __post_init__(self):
        self.cache_features = parse_switch("cache_features", self.cache_features)
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise ValueError(f"average_decay is {self.average_decay:g}: it must be above 0 and below 1.")
