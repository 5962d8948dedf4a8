"""How well images fit their prompts: CLIP score, R-precision and retrieval."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

from ..clip import embed_images, embed_texts
from .metrics import Features, as_features


IMAGES_AT_A_TIME = 64  # each with the embeddings of its candidate prompts, in float64


def clip_score(image_embeddings: Features, text_embeddings: Features, prompt_of: Sequence[int] | None = None) -> float:
    """100 times the mean cosine between the embeddings of an image and of its prompt.

    Papers on image generation report this as CLIP score. CLIPScore as first defined (arXiv 2104.08718) multiplies by
    2.5 instead, clips negative cosines to 0, and prepends "A photo depicts" to the text. Scores of different CLIP
    models, or with different templates, can't be compared.

    Args:
        image_embeddings (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): Embeddings of the images, of any length.
        text_embeddings (`np.ndarray` or `torch.Tensor` of shape `(m, d)`): Embeddings of the prompts.
        prompt_of (`Sequence[int]`, *optional*): The row of each image's prompt; by default that of the image.

    Returns:
        `float`: In [-100, 100].

    Raises:
        ValueError: If embeddings are not finite, or do not fit each other.

    Example:

    ```python
    >>> from llamagen_hf.clip import load_clip
    >>> from llamagen_hf.evaluation.text import clip_score, embed_pairs, r_precision

    >>> prompts = ["a red apple", "a green leaf"]
    >>> embeddings = embed_pairs(pipe(prompts).images, prompts, *load_clip("openai/clip-vit-base-patch32"))
    >>> clip_score(*embeddings), r_precision(*embeddings, num_candidates=2)
    ```
    """
    images, texts, prompt_of = _normalise(image_embeddings, text_embeddings, prompt_of)
    return 100 * (images * texts[prompt_of]).sum(-1).mean().item()


def prompt_clip_scores(
    image_embeddings: Features, text_embeddings: Features, prompt_of: Sequence[int] | None = None
) -> list[float]:
    """The CLIP score of each prompt over its own images, of which there must be at least one; as [`clip_score`]."""
    images, texts, prompt_of = _normalise(image_embeddings, text_embeddings, prompt_of)
    fits = 100 * (images * texts[prompt_of]).sum(-1)
    counts = prompt_of.bincount(minlength=len(texts))
    return (prompt_of.bincount(fits, minlength=len(texts)) / counts).tolist()


def r_precision(
    image_embeddings: Features,
    text_embeddings: Features,
    prompt_of: Sequence[int] | None = None,
    num_candidates: int = 100,
    seed: int = 0,
) -> float:
    """The share of images that fit their own prompt better than `num_candidates - 1` others.

    As introduced by AttnGAN (arXiv 1711.10485), with the cosine of CLIP's embeddings. The others are drawn for each
    image, without repetition, from the rest of the texts. If the own text is one of t texts that fit equally well and
    better than all others, the image counts as 1/t, the expectation of a random choice among them. A model that
    scores all texts alike thus gets 1 / num_candidates.

    Args:
        image_embeddings (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): Embeddings of the images, of any length.
        text_embeddings (`np.ndarray` or `torch.Tensor` of shape `(m, d)`): Embeddings of different prompts.
        prompt_of (`Sequence[int]`, *optional*): The row of each image's prompt; by default that of the image.
        num_candidates (`int`, *optional*, defaults to 100): Prompts to choose from, including the image's own.
        seed (`int`, *optional*, defaults to 0): Seed of the random choice of other prompts.

    Returns:
        `float`: In [0, 1].

    Raises:
        ValueError: If embeddings are not finite, do not fit each other, or are too few.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf.evaluation.text import r_precision

    >>> embeddings = torch.eye(8)
    >>> r_precision(embeddings, embeddings, num_candidates=4)
    1.0
    ```
    """
    images, texts, prompt_of = _normalise(image_embeddings, text_embeddings, prompt_of)
    if not 2 <= num_candidates <= len(texts):
        raise ValueError(
            f"R-precision among {num_candidates} prompts needs as many different ones, and at least 2; "
            f"there are {len(texts)}."
        )
    rng, credit = np.random.default_rng(seed), 0.0
    for start in range(0, len(images), IMAGES_AT_A_TIME):
        own = prompt_of[start : start + IMAGES_AT_A_TIME, None]
        drawn = [rng.choice(len(texts) - 1, num_candidates - 1, replace=False) for _ in own]
        others = torch.from_numpy(np.stack(drawn))
        others += others >= own  # skip the own prompt
        candidates = texts[torch.cat([own, others], dim=1)]
        # Not as a matrix product: equal texts must score equally to the last digit.
        scores = (images[start : start + IMAGES_AT_A_TIME, None] * candidates).sum(-1)
        is_best = scores == scores.amax(1, keepdim=True)
        credit += (is_best[:, 0] / is_best.sum(1)).sum().item()
    return credit / len(images)


def retrieval_recall(
    image_embeddings: Features, text_embeddings: Features, prompt_of: Sequence[int] | None = None
) -> tuple[float, float]:
    """R@1 of retrieval, as CLIP (arXiv 2103.00020) reports it: how often the nearest one of all belongs to the query.

    Args:
        image_embeddings (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): Embeddings of the images, of any length.
        text_embeddings (`np.ndarray` or `torch.Tensor` of shape `(m, d)`): Embeddings of different texts, each of one
            image at least.
        prompt_of (`Sequence[int]`, *optional*): The row of each image's text; by default that of the image.

    Returns:
        `tuple[float, float]`: The share of images that find their text, and the share of texts that find an image of
        theirs, in [0, 1].

    Raises:
        ValueError: If embeddings are not finite, or do not fit each other.
    """
    images, texts, prompt_of = _normalise(image_embeddings, text_embeddings, prompt_of)
    cosines = images @ texts.T
    text_found = cosines.argmax(1) == prompt_of
    image_found = prompt_of[cosines.argmax(0)] == torch.arange(len(texts))
    return text_found.double().mean().item(), image_found.double().mean().item()


@torch.no_grad()
def embed_pairs(
    images: Iterable[Image.Image | np.ndarray],
    prompts: Sequence[str],
    model: PreTrainedModel,
    processor: ProcessorMixin,
    template: str = "{}",
    batch_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """CLIP's embeddings of images and of their different prompts, as the functions here take them.

    Args:
        images (`Iterable`): PIL images, uint8 arrays `(height, width, 3)`, or
            [`~llamagen_hf.evaluation.images.Images`]. One batch at a time is in memory.
        prompts (`Sequence[str]`): The prompt or class name of each image. Several images may share one.
        model ([`~transformers.PreTrainedModel`]): A CLIP model, see [`~llamagen_hf.clip.load_clip`].
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        template (`str`, *optional*, defaults to `"{}"`): The text that CLIP reads, with `{}` for the prompt.
        batch_size (`int`, *optional*, defaults to 64): Images, and texts, at a time.

    Returns:
        Image embeddings `(n, d)`; text embeddings `(m, d)`, of each prompt in the order of first appearance; and the
        row of each image's prompt.

    Raises:
        ValueError: If there are not as many images as prompts.
    """
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    image_embeddings = embed_images(model, processor, images, batch_size)
    if len(image_embeddings) != len(prompts):
        raise ValueError(f"There are {len(image_embeddings)} images and {len(prompts)} prompts; expected a pair each.")
    text_embeddings = embed_texts(model, processor, [template.format(prompt) for prompt in rows], batch_size)
    return image_embeddings, text_embeddings, [rows[prompt] for prompt in prompts]


def _normalise(
    images: Features, texts: Features, prompt_of: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
    """Embeddings of length 1 in float64, and the row of each image's prompt."""
    images = F.normalize(as_features(images, "image embeddings", 1).double(), dim=-1)
    texts = F.normalize(as_features(texts, "text embeddings", 1).double(), dim=-1)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"The image embeddings are {images.shape[1]} wide and the text embeddings {texts.shape[1]}; "
            "they must be equal."
        )
    if prompt_of is None:
        if len(images) != len(texts):
            raise ValueError(
                f"There are {len(images)} image embeddings and {len(texts)} text embeddings; "
                "without `prompt_of` their numbers must be equal."
            )
        return images, texts, torch.arange(len(images))
    prompt_of = torch.as_tensor(prompt_of)
    if prompt_of.shape != (len(images),) or prompt_of.min() < 0 or prompt_of.max() >= len(texts):
        raise ValueError(
            f"`prompt_of` must give each of {len(images)} images a row of the {len(texts)} text embeddings."
        )
    return images, texts, prompt_of
