"""The two halves of a CLIP model as a prior reads them: captions as text conditions, images as embeddings."""

import copy
import textwrap
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    BaseImageProcessor,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging

from ..arguments import FieldError
from ..clip import load_clip
from ..conditioning.text import PromptLoss, find_loss, tokenize_prompts
from ..images.reading import read_image
from ..reproducibility import in_own_precision


logger = logging.get_logger(__name__)

PROMPT_CLEANING = "unicode"


@dataclass
class CLIPEncoders:
    """A CLIP model as two models, each with what prepares its inputs; no weights are copied.

    Args:
        text_encoder ([`~transformers.CLIPTextModelWithProjection`]): Reads captions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The text encoder's.
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`]): Reads images.
        image_processor ([`~transformers.BaseImageProcessor`]): The image encoder's.
    """

    text_encoder: CLIPTextModelWithProjection
    tokenizer: PreTrainedTokenizerBase
    image_encoder: CLIPVisionModelWithProjection
    image_processor: BaseImageProcessor

    @property
    def components(self) -> dict:
        """The four by name, as a pipeline takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def load_clip_encoders(path: str) -> CLIPEncoders:
    """Load both halves of a CLIP model.

    Args:
        path (`str` or `os.PathLike`): Folder or Hub id of a [`~transformers.CLIPModel`] with its processor.

    Raises:
        OSError: If there is none.
    """
    model, processor = load_clip(path)
    if not isinstance(model, CLIPModel):
        raise OSError(f"{str(path)!r} holds {type(model).__name__}; a prior needs CLIPModel.")
    return split_clip(model, processor)


def split_clip(model: CLIPModel, processor: ProcessorMixin) -> CLIPEncoders:
    """Both halves of a CLIP model, which share its weights, in evaluation mode and without gradients."""
    text_encoder = _half(CLIPTextModelWithProjection, model, model.config.text_config, ("text_",))
    image_encoder = _half(CLIPVisionModelWithProjection, model, model.config.vision_config, ("vision_", "visual_"))
    return CLIPEncoders(text_encoder, processor.tokenizer, image_encoder, processor.image_processor)


def _half(kind: type, model: CLIPModel, config, prefixes: tuple[str, ...]):
    # The classes' own loading takes the width of embeddings from the half's configuration, where it is another one.
    config = copy.deepcopy(config)
    config.projection_dim = model.config.projection_dim
    with torch.device("meta"):
        half = kind(config)
    weights = {name: value for name, value in model.state_dict().items() if name.startswith(prefixes)}
    half.load_state_dict(weights, assign=True)
    for name in dict(half.named_buffers()):  # positions, which are not saved
        owner, _, leaf = name.rpartition(".")
        setattr(half.get_submodule(owner), leaf, model.get_buffer(name))
    return half.eval().requires_grad_(False)


@dataclass
class TextCondition:
    """What a prior reads of captions.

    Args:
        embeds (`torch.Tensor` of shape `(batch, dim)`): CLIP's embeddings of the texts, of any length.
        states (`torch.Tensor` of shape `(batch, positions, dim)`): The text encoder's states, padded on the right.
        mask (`torch.LongTensor` of shape `(batch, positions)`): 1 for words, 0 for padding.
    """

    embeds: torch.Tensor
    states: torch.Tensor
    mask: torch.LongTensor

    def repeated(self, count: int) -> "TextCondition":
        """Each row as often as it takes to have `count` rows."""
        return TextCondition(*(each.repeat_interleave(count // len(self.embeds), 0) for each in self.tensors))

    @property
    def padded_left(self) -> tuple[torch.Tensor, torch.LongTensor]:
        """States and mask with the padding on the left, where states are 0: how an autoregressive prior reads them."""
        # A stable sort by the mask puts the zeros first and keeps the order of the words.
        order = self.mask.sort(dim=1, stable=True).indices
        states = self.states.masked_fill(self.mask[..., None] == 0, 0)
        return states.gather(1, order[..., None].expand_as(states)), self.mask.gather(1, order)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The three tensors."""
        return self.embeds, self.states, self.mask


def encode_captions(
    text_encoder: CLIPTextModelWithProjection, input_ids: torch.LongTensor, attention_mask: torch.LongTensor
) -> TextCondition:
    """Run CLIP's text encoder.

    [`~diffusers.PriorTransformer`] takes states as wide as embeddings. Where CLIP's are not, each state is projected
    as CLIP projects the last one.

    Args:
        text_encoder ([`~transformers.CLIPTextModelWithProjection`]): The text encoder.
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch, positions)`): Tokens, padded on the right.
    """
    output = text_encoder(input_ids, attention_mask=attention_mask)
    states = output.last_hidden_state
    if states.shape[-1] != text_encoder.config.projection_dim:
        states = text_encoder.text_projection(states)
    return TextCondition(output.text_embeds, states, attention_mask)


def encode_pixels(image_encoder: CLIPVisionModelWithProjection, pixel_values: torch.Tensor) -> torch.Tensor:
    """Embed images: `(batch, dim)` of length 1, in float32.

    Args:
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`]): The image encoder.
        pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): As the image processor makes them.

    Raises:
        ValueError: If an embedding is not finite.
    """
    embeds = image_encoder(pixel_values.to(image_encoder.device, image_encoder.dtype)).image_embeds.float()
    check_finite(embeds)
    return F.normalize(embeds, dim=-1)


def check_finite(embeds: torch.Tensor, field: str = "image_embeds") -> None:
    """Check image embeddings.

    Raises:
        FieldError: If one is not finite, or is zero and so has no direction.
    """
    for row, embed in enumerate(embeds):
        if not embed.isfinite().all() or not embed.any():
            kind = "zero" if embed.isfinite().all() else "not finite"
            raise FieldError(field, f"Image embedding {row} is {kind}; expected finite numbers that are not all 0.")


def tokenize_captions(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], length: int, truncate: bool = False
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Clean and tokenize captions; ids and mask `(batch, length)`, padded on the right.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): CLIP's.
        captions (`list[str]`): The captions. A warning says of which nothing can be read.
        length (`int`): Positions of CLIP's text encoder.
        truncate (`bool`, *optional*, defaults to `False`): Cut captions that are longer.

    Raises:
        FieldError: If one is longer.
    """
    for caption in captions:
        loss = find_loss(tokenizer, caption, length, PROMPT_CLEANING)
        if loss is not None and not loss.is_total and not truncate:
            raise FieldError("prompt", f"{too_long(caption, length)} Pass truncate_prompt=True to cut it.")
        if loss is not None and loss.is_total:
            logger.warning_once(f"{loss.sentence} It is {textwrap.shorten(caption, 200)!r}.")
    return tokenize_prompts(tokenizer, captions, length, PROMPT_CLEANING)


def is_too_long(tokenizer: PreTrainedTokenizerBase, caption: str, length: int) -> bool:
    """Whether CLIP's text encoder has fewer positions than a caption needs."""
    loss = find_loss(tokenizer, caption, length, PROMPT_CLEANING)
    return loss is not None and not loss.is_total


def too_long(caption: str, length: int) -> str:
    """The sentence about a caption that is too long."""
    return f"The caption {textwrap.shorten(caption, 60)!r} is longer than the {length} positions that CLIP reads."


class CLIPEncodingMixin:
    """Encodes prompts and images for a pipeline with the two halves of a CLIP model."""

    @torch.no_grad()
    @in_own_precision
    def encode_prompt(self, prompt: str | list[str], truncate_prompt: bool = False) -> TextCondition:
        """Clean, tokenize and encode prompts.

        Args:
            prompt (`str` or `list[str]`): The prompts.
            truncate_prompt (`bool`, *optional*, defaults to `False`): Cut those that are too long for CLIP.

        Raises:
            FieldError: If one is too long.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        tokens = tokenize_captions(self.tokenizer, prompts, self.condition_length, truncate_prompt)
        device = self._execution_device
        # On a CPU a batch saves little, and its size changes the last bits of every row in it.
        batches = [each.to(device).split(1 if device.type == "cpu" else len(prompts)) for each in tokens]
        rows = [encode_captions(self.text_encoder, *batch).tensors for batch in zip(*batches, strict=True)]
        return TextCondition(*(torch.cat(each) for each in zip(*rows, strict=True)))

    def find_loss(self, prompt: str) -> PromptLoss | None:
        """What CLIP does not read of a prompt, see [`~llamagen_hf.conditioning.text.find_loss`]."""
        return find_loss(self.tokenizer, prompt, self.condition_length, PROMPT_CLEANING)

    @torch.no_grad()
    @in_own_precision
    def encode_image(self, image: Image.Image | list[Image.Image]) -> torch.Tensor:
        """Embed images by CLIP's image encoder.

        Args:
            image (`PIL.Image.Image` or `list[PIL.Image.Image]`): Of any size.

        Returns:
            `torch.Tensor` of shape `(batch, dim)`: Embeddings of length 1, in float32.

        Raises:
            ValueError: If there is no image encoder, or an embedding is not finite.
        """
        if self.image_encoder is None or self.image_processor is None:
            raise ValueError("This prior has no image encoder with its image processor: load them with it.")
        images = image if isinstance(image, list) else [image]
        if not images or not all(isinstance(each, Image.Image) for each in images):
            raise FieldError("image", "`image` must be a PIL image or a list of them.")
        pixels = self.image_processor([read_image(each) for each in images], return_tensors="pt").pixel_values
        return encode_pixels(self.image_encoder, pixels.to(self._execution_device))
