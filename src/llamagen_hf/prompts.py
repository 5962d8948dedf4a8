"""Prompts as the generator reads them: cleaned, encoded, padded on the left."""

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


def clean_prompt(prompt: str) -> str:
    """Lower-case a prompt and drop links, markup, odd punctuation and the like.

    LlamaGen's captions went through the cleaning of DeepFloyd IF, twice in a row. diffusers holds its rules, but for
    one: white space is stripped at the end of each pass only, so odd punctuation at either end may survive.
    """
    for _ in range(2):
        prompt = IFPipeline._clean_caption(IFPipeline, prompt)
    return prompt


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Clean and tokenize prompts; ids and mask `(batch, n)`, padded on the right, n at most `length`."""
    tokens = tokenizer(
        [clean_prompt(prompt) for prompt in prompts],
        max_length=min(length, tokenizer.model_max_length),
        padding="max_length",
        padding_side="right",
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


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
