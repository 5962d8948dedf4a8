"""A small text encoder for datasets whose captions need no large pretrained one."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


def train_text_tokenizer(captions: Iterable[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of lower-cased captions, which any string can be written in.

    Args:
        captions (`Iterable[str]`): Text to learn pairs from.
        vocab_size (`int`): Tokens, 256 bytes and two special ones included.
        length (`int`): Longest prompt in tokens, longer ones are cut.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    # The end mark leaves even an empty prompt one position to attend to.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=length
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, heads: int) -> T5EncoderModel:
    """A T5 encoder with new weights and T5 v1.1's gated feed-forward."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)
