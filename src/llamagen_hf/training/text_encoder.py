"""A small text encoder for datasets whose captions need no large pretrained one."""

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import reduce
from diffusers.optimization import get_scheduler
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ..processes import this_process


logger = get_logger(__name__)


def train_text_tokenizer(captions: Iterable[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of lower-cased captions, which can encode any string.

    Args:
        captions (`Iterable[str]`): Text to learn pairs from.
        vocab_size (`int`): Number of tokens, 256 bytes and two special ones included.
        length (`int`): Longest prompt in tokens; longer ones are cut.
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
    """Build a T5 encoder with new weights and T5 v1.1's gated feed-forward layers.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): Whose tokens it reads.
        width, layers, heads (`int`): Its sizes; `width` is divided among the heads.
    """
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
    text_encoder = T5EncoderModel(config)
    # T5's own initialization, with a deviation of 1, would outlast a training as short as small datasets allow.
    nn.init.normal_(text_encoder.shared.weight, std=0.05)
    return text_encoder


def pretrain_text_encoder(
    text_encoder: T5EncoderModel,
    batches: Iterable[dict],
    target: Callable[[dict], torch.Tensor],
    steps: int,
    learning_rate: float,
) -> float:
    """Teach a new text encoder what its captions look like, before a model is trained to draw with it.

    A linear layer, discarded afterwards, predicts a summary of an image from the mean of its caption's states. A model
    that starts with random text states learns to go on with what it has drawn much sooner than to read the prompt, and
    then has little reason to read it.

    Args:
        text_encoder ([`~transformers.T5EncoderModel`]): Trained in place.
        batches (`Iterable[dict]`): At least `steps` batches with `input_ids` and `attention_mask`, of one size; those
            of this process, if there are several.
        target (`Callable`): The summaries of a batch's images, `(batch, n)`.
        steps (`int`): Optimizer steps.
        learning_rate (`float`): Peak rate; it warms up and falls to 0 along a cosine.

    Returns:
        `float`: Explained share of the variance, at most 1, over the last tenth of the steps.
    """
    device = text_encoder.device
    head, explained = None, []
    text_encoder.train()
    for step, batch in enumerate(itertools.islice(batches, steps), start=1):
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.no_grad():
            expected = target(batch)
        if head is None:
            head = nn.Linear(text_encoder.config.d_model, expected.shape[1]).to(device)
            optimizer = torch.optim.AdamW([*text_encoder.parameters(), *head.parameters()], lr=learning_rate)
            scheduler = get_scheduler("cosine", optimizer, None, min(100, steps // 10), steps)
        longest = batch["attention_mask"].sum(1).max()  # captions are much shorter than the longest prompt
        input_ids, mask = batch["input_ids"][:, :longest], batch["attention_mask"][:, :longest]
        states = text_encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        loss = F.mse_loss(head(mean), expected)
        loss.backward()
        if this_process().num_processes > 1:  # each has a part of the batch
            for parameter in (*text_encoder.parameters(), *head.parameters()):
                parameter.grad = reduce(parameter.grad, "mean")
        nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        explained.append(1 - loss.item() / expected.var(0).mean().item())
        if step % 200 == 0:
            logger.info(f"text encoder step {step}: {sum(explained[-200:]) / 200:.1%} of the variance explained")
    last = explained[-max(1, steps // 10) :]
    return sum(last) / len(last)
