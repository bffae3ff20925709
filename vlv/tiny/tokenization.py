"""Small byte-level BPE tokenizers for the tiny parts. Words of captions are single tokens; other text works too."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    eos_token: str,
    bos_token: str,
    pad_token: str | None = None,
    extra_special_tokens: dict[str, str] | None = None,
    model_max_length: int = 128,
) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE tokenizer from `texts`.

    Args:
        vocab_size: largest size of the vocabulary. 256 entries are the bytes, so that any text has tokens.
        pad_token: defaults to `eos_token`.
        extra_special_tokens: more special tokens by attribute name, e.g. `{"image_token": "<image>"}`.

    Returns:
        a fast tokenizer that encodes as `bos ... eos`. `AutoTokenizer.from_pretrained` loads it when it is saved.
    """
    pad_token = pad_token or eos_token
    extra_special_tokens = extra_special_tokens or {}
    special = list(dict.fromkeys([bos_token, pad_token, eos_token, *extra_special_tokens.values()]))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A {eos_token}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos_token, eos_token)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos_token,
        eos_token=eos_token,
        pad_token=pad_token,
        extra_special_tokens=extra_special_tokens,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
