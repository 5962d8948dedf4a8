"""Prompts as the generator reads them: cleaned, encoded, padded on the left."""

import html
import re
import textwrap
import unicodedata
from functools import lru_cache
from typing import Literal, NamedTuple, get_args
from urllib.parse import unquote_plus

import ftfy
import torch
import torch.nn.functional as F
from bs4 import BeautifulSoup
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)


PromptCleaning = Literal["unicode", "released"]
"""How a checkpoint cleans its prompts, see [`clean_prompt`]."""

# Format characters that belong to the text: joiners of emoji and of Persian, and the letters of flags.
JOINERS = "\u200c\u200d"
FLAG_TAGS = ("\U000e0020", "\U000e007f")

# The released cleaning: patterns and what replaces each of their matches, in this order.
URL = r"\b(?:{}:(?:/{{1,3}}|[a-z0-9%])|[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@))"
FILES = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
DASHES = (
    r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    r"\ufe31\ufe32\ufe58\ufe63\uff0d]+"
)
ADDRESS_RULES = {"<person>": "person", URL.format("https?"): "", URL.format("www"): ""}
SYMBOL_RULES = {
    r"@\w+": "",
    r"[\u31c0-\u9fff]+": "",  # Chinese characters and the like
    DASHES: "-",
    r"[`´«»“”¨]": '"',
    r"[‘’]": "'",
    r"&quot;?": "",
    r"&amp": "",
    r"\d{1,3}(?:\.\d{1,3}){3}": " ",  # IP addresses
    r"\d:\d\d\s+$": "",
    r"\\n": " ",
    r"#(?:\d{1,3}|\d{5,})\b": "",
    r"\b\d{6,}\b": "",
    rf"\S+\.{FILES}": "",
    r"[\"']{2,}": '"',
    r"\.{2,}": " ",
    r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+": " ",
    r"\s+\.\s+": " ",
}
WORD_RULES = {
    r"\b(?:[a-zA-Z]{1,3}\d{3,15}|[a-zA-Z]+\d+[a-zA-Z]+|\d+[a-zA-Z]+\d+)\b": "",  # article numbers
    r"(?:worldwide\s+)?(?:free\s+)?shipping": "",
    r"(?:free\s)?download(?:\sfree)?": "",
    r"\bclick\s(?:for|on)\s\w+": "",
    rf"\b{FILES}(?:\simages?)?": "",
    r"\bpage\s+\d+\b": "",
    r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b": " ",
    r"\b\d+\.?\d*[xх×]\d+\.?\d*\b": "",  # sizes; the second x is Cyrillic
    r"\b\s+:\s+": ": ",
    r"(\D[,./])\b": r"\1 ",
    r"\s+": " ",
    r"^[\"'](.+)[\"']$": r"\1",
    r"^['_,\-:;]": "",
    r"['_,\-:+]$": "",
    r"^\.\S+$": "",
}


def check_prompt_cleaning(value: str) -> None:
    """Raise a `ValueError` if there is no such cleaning."""
    if value not in get_args(PromptCleaning):
        expected = " or ".join(map(repr, get_args(PromptCleaning)))
        raise ValueError(f"`prompt_cleaning` is {value!r}; expected {expected}.")


@lru_cache(maxsize=4096)  # a caption is checked before it is tokenized
def clean_prompt(prompt: str, cleaning: PromptCleaning) -> str:
    """Clean a prompt as its checkpoint expects it.

    Args:
        prompt (`str`): Any text.
        cleaning (`str`): `"unicode"` keeps every word of every language: it repairs text that was decoded wrongly,
            writes each character in one way (NFC, straight quotes, normal width), removes invisible characters and
            turns all white space into single blanks. `"released"` is what the captions of LlamaGen's training went
            through: lower case, without links, markup, Chinese characters, odd punctuation and the like.

    Raises:
        ValueError: If there is no such cleaning.
    """
    check_prompt_cleaning(cleaning)
    if cleaning == "released":
        return _clean_as_released(_clean_as_released(prompt))
    prompt = " ".join(ftfy.fix_text(prompt).split())
    prompt = "".join(c for c in prompt if unicodedata.category(c) not in ("Cc", "Cf") or _is_written(c))
    is_visible = prompt.strip(" \ufe0e\ufe0f" + JOINERS)  # there may be joiners, and nothing to join
    return prompt.strip() if is_visible else ""


def _is_written(character: str) -> bool:
    return character in JOINERS or FLAG_TAGS[0] <= character <= FLAG_TAGS[1]


def _clean_as_released(text: str) -> str:
    """One pass of DeepFloyd IF's cleaning, which LlamaGen's captions went through twice.

    Equal to that of diffusers. Both strip white space at the end of a pass only, whereas the released code does it
    before the punctuation at either end is removed too.
    """
    text = _replace(ADDRESS_RULES, unquote_plus(text).strip().lower())
    text = _replace(SYMBOL_RULES, BeautifulSoup(text, features="html.parser").text)
    if len(re.findall("[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _replace(WORD_RULES, text).strip()


def _replace(rules: dict[str, str], text: str) -> str:
    for pattern, replacement in rules.items():
        text = re.sub(pattern, replacement, text)
    return text


def load_text_encoder(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained text encoder and its tokenizer, from a folder or a Hub id such as `google/flan-t5-xl`.

    Of a CLIP it is the text encoder, whose states are those of its last layer, one for each word.
    """
    # A T5 checkpoint holds a decoder too, and CLIP's an image encoder, which conditioning does not need.
    kinds = {"t5": T5EncoderModel, "clip": CLIPTextModel}
    encoder = kinds.get(AutoConfig.from_pretrained(path).model_type, AutoModel).from_pretrained(path)
    return encoder.eval(), AutoTokenizer.from_pretrained(path)


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
    """What a checkpoint does not read of a prompt: all of it, or its end. The sentence says so."""

    is_total: bool
    sentence: str


def find_loss(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int, cleaning: str) -> PromptLoss | None:
    """What [`tokenize_prompts`] silently drops of a prompt; `None` if nothing, as with the empty prompt."""
    # Not verbose, since too long prompts are expected here.
    tokens = tokenizer(clean_prompt(prompt, cleaning), add_special_tokens=False, verbose=False).input_ids
    known = [token for token in tokens if token != tokenizer.unk_token_id]
    if prompt and not tokenizer.decode(known, skip_special_tokens=True).strip():
        return PromptLoss(
            True, "This checkpoint can read nothing of the prompt, and would generate as for an empty one."
        )
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
        # The whole model, since offloading brings the weights when it is called; its decoder reads a single token.
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
