"""Prompts as the generator reads them: cleaned, encoded, padded on the left."""

import textwrap
import unicodedata
from functools import lru_cache
from typing import NamedTuple

import ftfy
import torch
import torch.nn.functional as F
from diffusers.pipelines.deepfloyd_if import IFPipeline
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel


def load_text_encoder(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained text encoder and its tokenizer, from a folder or a Hub id such as `google/flan-t5-xl`."""
    # A T5 checkpoint holds a decoder too, which conditioning does not need.
    is_t5 = AutoConfig.from_pretrained(path).model_type == "t5"
    encoder = (T5EncoderModel if is_t5 else AutoModel).from_pretrained(path)
    return encoder.eval(), AutoTokenizer.from_pretrained(path)


# How a checkpoint cleans its prompts, see [`clean_prompt`].
PROMPT_CLEANINGS = ("unicode", "released")

# Format characters that are part of what is written: joiners of emoji and of Persian, and the letters of flags.
JOINERS = "\u200c\u200d"
FLAG_TAGS = ("\U000e0020", "\U000e007f")


def check_prompt_cleaning(value: str) -> None:
    """Raise a `ValueError` if there is no such cleaning."""
    if value not in PROMPT_CLEANINGS:
        raise ValueError(f"`prompt_cleaning` is {value!r}; expected {' or '.join(map(repr, PROMPT_CLEANINGS))}.")


@lru_cache(maxsize=4096)  # a caption is looked at before it is tokenized
def clean_prompt(prompt: str, cleaning: str) -> str:
    """Clean a prompt as its checkpoint wants it.

    Args:
        prompt (`str`): Any text.
        cleaning (`str`): `"unicode"` keeps every word of every language: it repairs what a wrong encoding did, writes
            each character in one way (NFC, straight quotes, normal width), removes invisible characters and makes
            every white space a blank. `"released"` is what LlamaGen's captions went through: lower case, and without
            links, markup, Chinese characters, odd punctuation and the like.

    Raises:
        ValueError: If there is no such cleaning.
    """
    check_prompt_cleaning(cleaning)
    if cleaning == "released":
        # The cleaning of DeepFloyd IF, twice in a row. diffusers holds its rules, but for one: white space is stripped
        # at the end of each pass only, so odd punctuation at either end may survive.
        for _ in range(2):
            prompt = IFPipeline._clean_caption(IFPipeline, prompt)
        return prompt
    prompt = " ".join(ftfy.fix_text(prompt).split())
    prompt = "".join(c for c in prompt if unicodedata.category(c) not in ("Cc", "Cf") or _is_written(c))
    is_visible = prompt.strip(" \ufe0e\ufe0f" + JOINERS)  # there may be joiners, and nothing to join
    return prompt.strip() if is_visible else ""


def _is_written(character: str) -> bool:
    return character in JOINERS or FLAG_TAGS[0] <= character <= FLAG_TAGS[1]


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int, cleaning: str
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Clean and tokenize prompts; ids and mask `(batch, n)`, padded on the right, n at most `length`."""
    tokens = tokenizer(
        [clean_prompt(prompt, cleaning) for prompt in prompts],
        max_length=min(length, tokenizer.model_max_length),
        padding="max_length",
        padding_side="right",
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


class PromptLoss(NamedTuple):
    """What a checkpoint does not read of a prompt: all of it, or its end; and a sentence that says so."""

    is_total: bool
    sentence: str


def find_loss(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int, cleaning: str) -> PromptLoss | None:
    """What [`tokenize_prompts`] drops of a prompt unasked; `None` if nothing, as of the empty prompt."""
    # Not verbose: a prompt that is too long is what is looked for.
    tokens = tokenizer(clean_prompt(prompt, cleaning), add_special_tokens=False, verbose=False).input_ids
    known = [token for token in tokens if token != tokenizer.unk_token_id]
    if prompt and not tokenizer.decode(known, skip_special_tokens=True).strip():
        return PromptLoss(True, "This checkpoint can read nothing of the prompt, and would draw as for an empty one.")
    room = min(length, tokenizer.model_max_length) - tokenizer.num_special_tokens_to_add()
    if len(tokens) > room:
        end = textwrap.shorten(tokenizer.decode(tokens[room:], skip_special_tokens=True), 200, placeholder=" ...")
        return PromptLoss(False, f"The prompt is too long for this checkpoint, which leaves out its end: {end!r}.")


def encode_tokens(
    text_encoder: PreTrainedModel, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, length: int
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Run the text encoder and move its padding to the left.

    Args:
        text_encoder ([`~transformers.PreTrainedModel`]): Any encoder, or an encoder-decoder, whose encoder is used.
        input_ids (`torch.LongTensor` of shape `(batch, n)`): Tokens, padded on the right.
        attention_mask (`torch.LongTensor` of shape `(batch, n)`): 0 for padding.
        length (`int`): Positions of the result.

    Returns:
        States `(batch, length, width)`, zero at padded positions, and their mask `(batch, length)`.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if text_encoder.config.is_encoder_decoder:
        # The whole model, since offloading brings the weights when that is called; its decoder reads a single token.
        states = text_encoder(**inputs, decoder_input_ids=input_ids[:, :1], use_cache=False).encoder_last_hidden_state
    else:
        states = text_encoder(**inputs).last_hidden_state
    states = states * attention_mask[..., None].to(states.dtype)
    # A stable sort by the mask puts the zeros first and keeps the order of the words.
    order = attention_mask.sort(dim=1, stable=True).indices
    states = states.gather(1, order[..., None].expand_as(states))
    padding = length - input_ids.shape[1]
    states = F.pad(states, (0, 0, padding, 0))
    return states, F.pad(attention_mask.gather(1, order), (padding, 0))
