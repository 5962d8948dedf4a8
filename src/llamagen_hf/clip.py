"""How well images fit texts, by CLIP (arXiv 2103.00020)."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from .images.reading import read_image
from .loading.checkpoint import align_weights


def load_clip(path: str, **kwargs) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a CLIP model of transformers and its processor from a folder or the Hub.

    Args:
        path (`str` or `os.PathLike`): CLIP, or a model with its methods: SigLIP, MetaCLIP 2, Chinese-CLIP, ...
        kwargs: As for `AutoModel.from_pretrained`, such as `dtype` or `revision`.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`: The model, in evaluation mode, and its processor.

    Raises:
        OSError: If there is no model, or it does not embed images and texts.
    """
    try:
        model, processor = AutoModel.from_pretrained(path, **kwargs), AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"There is no CLIP model with a processor at {str(path)!r}: {reason}") from error
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise OSError(f"{str(path)!r} holds {type(model).__name__}, not a CLIP model.")
    align_weights(model)
    return model.eval(), processor


def embed_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable[Image.Image | np.ndarray],
    batch_size: int = 64,
) -> torch.Tensor:
    """Embed images with CLIP, anything that `read_image` takes: `(images, width)` of length 1, in float32."""
    embeddings = []
    for batch in _batches(images, batch_size):
        batch = [read_image(image) for image in batch]
        inputs = processor.image_processor(batch, return_tensors="pt").to(model.device, model.dtype)
        embeddings.append(F.normalize(model.get_image_features(**inputs).pooler_output.float(), dim=-1))
    return torch.cat(embeddings)


def pixel_values(processor: ProcessorMixin, images: torch.Tensor) -> torch.Tensor:
    """Square images in a tensor as CLIP reads them, as its processor makes them from image files of the same size.

    Args:
        processor ([`~transformers.ProcessorMixin`]): The CLIP's.
        images (`torch.Tensor` of shape `(batch, 3, size, size)`): Images in [-1, 1], of any size.

    Returns:
        `torch.Tensor` of shape `(batch, 3, clip_size, clip_size)`: Resized and normalised, with gradients.
    """
    own, images = processor.image_processor, (images + 1) / 2
    side = own.crop_size["height"] if own.do_center_crop else own.size["height"]
    if images.shape[-1] != side:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, deviation = (images.new_tensor(value)[:, None, None] for value in (own.image_mean, own.image_std))
    return (images - mean) / deviation


def embed_texts(
    model: PreTrainedModel, processor: ProcessorMixin, texts: Iterable[str], batch_size: int = 64
) -> torch.Tensor:
    """Embed texts with CLIP, truncated to its longest input: `(texts, width)` of length 1, in float32."""
    length = min(model.config.text_config.max_position_embeddings, processor.tokenizer.model_max_length)
    options = {"truncation": True, "max_length": length, "return_tensors": "pt", "padding": True}
    if model.config.model_type.startswith("siglip"):  # trained on padded texts without a mask
        options |= {"padding": "max_length", "return_attention_mask": False}
    embeddings = []
    for batch in _batches(texts, batch_size):
        inputs = processor.tokenizer(batch, **options).to(model.device)
        embeddings.append(F.normalize(model.get_text_features(**inputs).pooler_output.float(), dim=-1))
    return torch.cat(embeddings)


def _batches(values: Iterable, batch_size: int) -> Iterator[list]:
    values = iter(values)
    while batch := list(islice(values, batch_size)):
        yield batch


class CLIPScorer:
    """Scores images by the cosine between CLIP's embeddings of image and prompt: a `scorer` for `num_candidates`.

    Args:
        model ([`~transformers.CLIPModel`]): A CLIP model of transformers.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        template (`str`, *optional*, defaults to `"a photo of {}"`): The text that CLIP reads, with `{}` for the
            prompt.

    Example:

    ```python
    >>> scorer = CLIPScorer.from_pretrained("openai/clip-vit-base-patch32")
    >>> best = pipe("a red apple", num_candidates=8, scorer=scorer).images[0]
    ```
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, template: str = "a photo of {}"):
        self.model = model.eval()
        self.processor = processor
        self.template = template

    @classmethod
    def from_pretrained(cls, path: str, template: str = "a photo of {}", **kwargs) -> "CLIPScorer":
        """Load a CLIP model from a folder or the Hub; arguments and errors as for [`~llamagen_hf.clip.load_clip`]."""
        return cls(*load_clip(path, **kwargs), template)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """Score images.

        Args:
            images (`list[PIL.Image.Image]`): The images.
            prompts (`list[str]`): A prompt or class name for each.

        Returns:
            `list[float]`: Cosines in [-1, 1], one for each image.
        """
        texts = embed_texts(self.model, self.processor, [self.template.format(prompt) for prompt in prompts])
        return (embed_images(self.model, self.processor, images) * texts).sum(-1).tolist()
