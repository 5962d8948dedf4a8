"""How well pictures fit texts, by CLIP (arXiv 2103.00020)."""

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoProcessor, CLIPModel, ProcessorMixin


def embed_pictures(model: CLIPModel, processor: ProcessorMixin, pictures: list[Image.Image]) -> torch.Tensor:
    """CLIP's embeddings of pictures, (pictures, width) of length 1, in float32."""
    inputs = processor.image_processor(pictures, return_tensors="pt").to(model.device, model.dtype)
    return F.normalize(model.get_image_features(**inputs).pooler_output.float(), dim=-1)


def embed_texts(model: CLIPModel, processor: ProcessorMixin, texts: list[str]) -> torch.Tensor:
    """CLIP's embeddings of texts, (texts, width) of length 1, in float32; what CLIP can't read is cut off."""
    length = model.config.text_config.max_position_embeddings
    inputs = processor.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return F.normalize(model.get_text_features(**inputs.to(model.device)).pooler_output.float(), dim=-1)


class CLIPScorer:
    """Scores pictures by the cosine between CLIP's embeddings of picture and prompt, for `num_candidates`.

    Args:
        model ([`~transformers.CLIPModel`]): A CLIP model of transformers.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        template (`str`, *optional*, defaults to `"a photo of {}"`): What CLIP reads, `{}` being the prompt.

    Example:

    ```python
    >>> scorer = CLIPScorer.from_pretrained("openai/clip-vit-base-patch32")
    >>> best = pipe("a red apple", num_candidates=8, scorer=scorer).images[0]
    ```
    """

    def __init__(self, model: CLIPModel, processor: ProcessorMixin, template: str = "a photo of {}"):
        self.model = model.eval()
        self.processor = processor
        self.template = template

    @classmethod
    def from_pretrained(cls, path: str, template: str = "a photo of {}", **kwargs) -> "CLIPScorer":
        """Load a CLIP model from a folder or the Hub; `kwargs` are those of `CLIPModel.from_pretrained`."""
        return cls(CLIPModel.from_pretrained(path, **kwargs), AutoProcessor.from_pretrained(path), template)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """Score pictures.

        Args:
            images (`list[PIL.Image.Image]`): The pictures.
            prompts (`list[str]`): A prompt or class name for each.

        Returns:
            `list[float]`: Cosines in [-1, 1], one for each picture.
        """
        texts = embed_texts(self.model, self.processor, [self.template.format(prompt) for prompt in prompts])
        return (embed_pictures(self.model, self.processor, images) * texts).sum(-1).tolist()
