"""Stage `language`: a small causal language model learns the captions' language from text alone."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, TrainingArguments

from vlv.data.rows import captions_of
from vlv.scenes import WORLDS, World, world
from vlv.training.checks import require_at_least_1, require_multiples
from vlv.training.examples import Table, tokenize
from vlv.training.stage import Settings, Stage


@dataclass
class LanguageSettings(Settings):
    max_length: int = field(
        default=24, metadata={"help": "Caption length in tokens, end-of-text and padding included."}
    )
    vocab_size: int = field(default=600, metadata={"help": "Largest size of the vocabulary; 256 entries are bytes."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the language model, a multiple of 8."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of the language model."})
    world: str | None = field(
        default=None,
        metadata={"help": f"World whose grammar the captions are measured with: {', '.join(WORLDS)}."},
    )

    def __post_init__(self):
        require_at_least_1(self, "max_length", "num_hidden_layers")
        require_multiples(self, hidden_size=8)


def tiny_language_model(tokenizer: PreTrainedTokenizerBase, width: int, layers: int) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 with tied embeddings."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            use_sliding_window=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def causal_table(tokenizer: PreTrainedTokenizerBase, captions: list[str], max_length: int) -> Table:
    """Captions with their end-of-text token, which is part of the loss. The padding after it is not."""
    input_ids = tokenize(tokenizer, [caption + tokenizer.eos_token for caption in captions], max_length)
    # Padding is the end-of-text token too, but only the first of these tokens has a label.
    is_end = (input_ids == tokenizer.eos_token_id).long()
    padding = is_end.cumsum(dim=1) - is_end > 0
    return Table(input_ids=input_ids, attention_mask=(~padding).long(), labels=input_ids.masked_fill(padding, -100))


class LanguageStage(Stage):
    Settings = LanguageSettings
    smooths_labels = True

    def __init__(self, settings: LanguageSettings, args: TrainingArguments):
        super().__init__(settings, args)
        self.world = world(settings.world) if settings.world else None
        self.captions = tuple(
            [caption for value in self.captioned(rows)[settings.caption_column][:] for caption in captions_of(value)]
            for rows in self.load_data()
        )
        # Qwen2's own tokenizer class, with a vocabulary that is learned from these captions.
        self.tokenizer = Qwen2Tokenizer().train_new_from_iterator(
            self.captions[0], settings.vocab_size, show_progress=False
        )
        self.model = tiny_language_model(self.tokenizer, settings.hidden_size, settings.num_hidden_layers)

    def prepare(self) -> None:
        self.train_dataset, self.eval_dataset = (
            causal_table(self.tokenizer, captions, self.settings.max_length) for captions in self.captions
        )

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.inference_mode()
    def evaluate(self, samples: int = 200) -> dict[str, float]:
        """Perplexity per token of the evaluation captions; with a world, the share of samples in its grammar."""
        inputs = {name: column.to(self.model.device) for name, column in self.eval_dataset.columns.items()}
        measured = {"perplexity": math.exp(self.model(**inputs).loss.item())}
        if self.world is None:
            return measured

        start = inputs["input_ids"][:samples, :1]  # the first token is the same in all captions: "a"
        generated = self.model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            max_new_tokens=self.settings.max_length,
        )
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return measured | {"grammatical": sum(follows_grammar(text, self.world) for text in texts) / len(texts)}


def follows_grammar(text: str, world: World) -> bool:
    try:
        world.parse_caption(text)
    except ValueError:
        return False
    return True
