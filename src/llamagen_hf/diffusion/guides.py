"""Guides: gradients that lead a pixel diffusion towards a class or a text that its U-Net was not told.

A guide is passed to [`~llamagen_hf.PixelDiffusionPipeline`] as `guide`. At each step its gradient is added to the
score of the U-Net (arXiv 2105.05233, algorithm 2), after classifier-free guidance and before thresholding.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from ..arguments import FieldError, plain
from ..clip import embed_texts, load_clip
from .noisy_classifier import ALPHAS_CUMPROD, NoisyClassifier


class ScaledGuide(ABC):
    """A guide with a scale; at 0 it changes nothing."""

    def __init__(self, scale: float):
        scale = plain(scale)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise FieldError("scale", f"The guide's `scale` is {scale!r}; expected a finite number.")
        self.scale = scale

    def __call__(
        self, noisy: torch.Tensor, timestep: torch.Tensor, images: torch.Tensor, alpha: float
    ) -> torch.Tensor:
        """The gradient at noisy images, see [`~llamagen_hf.diffusion.denoising.denoise`]."""
        if self.scale == 0:
            return torch.zeros_like(noisy)
        # Whatever the context of the caller; what was made in inference mode has gradients only as a copy.
        with torch.inference_mode(False), torch.enable_grad():
            gradient = self.gradient(noisy.detach().clone(), timestep.clone(), images.detach().clone(), alpha)
        return self.scale * gradient.to(noisy)

    @abstractmethod
    def gradient(
        self, noisy: torch.Tensor, timestep: torch.Tensor, images: torch.Tensor, alpha: float
    ) -> torch.Tensor:
        """The gradient at scale 1, computed where gradients are on."""

    @property
    @abstractmethod
    def facts(self) -> dict:
        """What the parameters of an image say about its guide."""


class ClassifierGuide(ScaledGuide):
    r"""Leads towards classes by the gradient of log p(y | x) of a classifier of noisy images.

    This is classifier guidance (arXiv 2105.05233, section 4). With a perfect classifier and scale 1, an unconditional
    model draws from the conditional distribution; a higher scale sharpens the classes.

    Args:
        classifier ([`~llamagen_hf.diffusion.noisy_classifier.NoisyClassifier`] or `torch.nn.Module`):
            Takes noisy images `(batch, 3, height, width)` and timesteps `(batch,)`, and returns logits
            `(batch, classes)`. It must know the noise schedule of the U-Net.
        labels (`int`, `str` or `list`):
            Class id or name, or a list of them: one for all images, or one for each prompt or image.
        scale (`float`, *optional*, defaults to 1.0): Strength of the guide. 0 for none, below 0 leads away.

    Raises:
        ValueError: If there is no such class. When it is called, if the number of labels, the size of the images or
            the noise schedule does not fit.

    Example:

    ```python
    >>> from llamagen_hf import PixelDiffusionPipeline
    >>> from llamagen_hf.diffusion.guides import ClassifierGuide

    >>> pipe = PixelDiffusionPipeline.from_pretrained("runs/emoji/imagen")
    >>> guide = ClassifierGuide.from_pretrained("runs/emoji/classifier", labels=["food-drink"], scale=2.0)
    >>> image = pipe("a red apple", guide=guide).images[0]
    ```
    """

    def __init__(self, classifier: nn.Module, labels: int | str | list[int | str], scale: float = 1.0):
        super().__init__(scale)
        self.classifier = classifier.eval().requires_grad_(False)
        self.labels = list(labels) if isinstance(labels, list | tuple) else [labels]
        if not self.labels:
            raise FieldError("labels", "`labels` is empty; expected at least one class.")
        self.ids = self.labels
        if isinstance(classifier, NoisyClassifier):
            self.ids = classifier.class_ids(self.labels)
            self.labels = [classifier.config.labels[index] for index in self.ids]

    @classmethod
    def from_pretrained(
        cls, path: str, labels: int | str | list[int | str], scale: float = 1.0, **kwargs
    ) -> "ClassifierGuide":
        """Load a [`~llamagen_hf.diffusion.noisy_classifier.NoisyClassifier`] from a folder or the Hub.

        Args:
            path (`str` or `os.PathLike`): What `llamagen train-classifier` saved.
            labels, scale: As for the class.
            kwargs: As for its `from_pretrained`, such as `revision`.

        Raises:
            OSError: If there is no classifier.
        """
        try:
            classifier = NoisyClassifier.from_pretrained(path, **kwargs)
        except (OSError, TypeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise OSError(f"There is no classifier of noisy images at {str(path)!r}: {reason}") from error
        return cls(classifier, labels, scale)

    def to(self, *args, **kwargs) -> "ClassifierGuide":
        """Move the classifier; arguments as for `torch.nn.Module.to`."""
        self.classifier.to(*args, **kwargs)
        return self

    def gradient(
        self, noisy: torch.Tensor, timestep: torch.Tensor, images: torch.Tensor, alpha: float
    ) -> torch.Tensor:
        if isinstance(self.classifier, NoisyClassifier) and abs(ALPHAS_CUMPROD[int(timestep)] - alpha) > 1e-3:
            raise ValueError("The classifier was trained on another noise schedule than that of the U-Net.")
        ids = torch.tensor(repeated(self.ids, len(noisy), "labels"))
        noisy.requires_grad_(True)
        logits = self.classifier(noisy, timestep.expand(len(noisy)))
        log_p = F.log_softmax(logits, dim=-1)[torch.arange(len(ids)), ids.to(logits.device)]
        return torch.autograd.grad(log_p.sum(), noisy)[0]

    @property
    def facts(self) -> dict:
        return {"name": "ClassifierGuide", "labels": self.labels, "scale": self.scale}


class CLIPGuide(ScaledGuide):
    r"""Leads towards texts by the gradient of CLIP's similarity of the images that are predicted at each step.

    CLIP looks at the predicted images, so that any CLIP will do (arXiv 2302.07121), and none must be trained on noise,
    as in GLIDE (arXiv 2112.10741). The gradient passes no U-Net: a predicted image is taken to change with the noisy
    one by `sqrt(alpha)`, as the mean of standard normal data given x does. So it costs no more than CLIP, and moves
    the predicted image by `scale * (1 - alpha)` times the gradient there: much at first, nothing at the end.

    Args:
        model ([`~transformers.CLIPModel`]): A CLIP model of transformers, or one with its methods.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        prompts (`str` or `list[str]`): A text for all images, or one for each prompt or image.
        scale (`float`, *optional*, defaults to 1.0):
            Strength of the guide. At 1 the log probability is the cosine divided by CLIP's temperature, as in CLIP's
            own loss. 0 for none.
        template (`str`, *optional*, defaults to `"{}"`): The text that CLIP reads, with `{}` for the prompt.

    Example:

    ```python
    >>> from llamagen_hf.diffusion.guides import CLIPGuide

    >>> guide = CLIPGuide.from_pretrained("openai/clip-vit-base-patch32", "a red apple", scale=5.0)
    >>> image = pipe("fruit", guide=guide).images[0]
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompts: str | list[str],
        scale: float = 1.0,
        template: str = "{}",
    ):
        super().__init__(scale)
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not self.prompts:
            raise FieldError("prompts", "`prompts` is empty; expected at least one text.")
        self.model = model.eval().requires_grad_(False)
        statistics = processor.image_processor
        self.mean, self.std = torch.tensor([statistics.image_mean, statistics.image_std])[..., None, None]
        with torch.no_grad():
            self.texts = embed_texts(model, processor, [template.format(prompt) for prompt in self.prompts])

    @classmethod
    def from_pretrained(
        cls, path: str, prompts: str | list[str], scale: float = 1.0, template: str = "{}", **kwargs
    ) -> "CLIPGuide":
        """Load a CLIP model from a folder or the Hub; `kwargs` and errors as for [`~llamagen_hf.clip.load_clip`]."""
        return cls(*load_clip(path, **kwargs), prompts, scale, template)

    def to(self, *args, **kwargs) -> "CLIPGuide":
        """Move CLIP; arguments as for `torch.nn.Module.to`."""
        self.model.to(*args, **kwargs)
        return self

    def gradient(
        self, noisy: torch.Tensor, timestep: torch.Tensor, images: torch.Tensor, alpha: float
    ) -> torch.Tensor:
        rows = torch.tensor(repeated(list(range(len(self.prompts))), len(images), "prompts"))
        images.requires_grad_(True)
        cosines = (self.embed(images) * self.texts.to(self.model.device)[rows]).sum(-1)
        log_p = self.model.logit_scale.float().exp() * cosines
        return math.sqrt(alpha) * torch.autograd.grad(log_p.sum(), images)[0]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """CLIP's embeddings of images `(batch, 3, height, width)` in [-1, 1], differentiable: of length 1, float32."""
        side, device = self.model.config.vision_config.image_size, self.model.device
        pixels = images.float() / 2 + 0.5
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        pixels = ((pixels.to(device) - self.mean.to(device)) / self.std.to(device)).to(self.model.dtype)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    @property
    def facts(self) -> dict:
        return {"name": "CLIPGuide", "prompts": self.prompts, "scale": self.scale}


def repeated(values: list, rows: int, name: str) -> list:
    """The value of each row: rows of one prompt, its candidates among them, follow each other.

    Raises:
        FieldError: If the rows can't be shared out.
    """
    if rows % len(values):
        raise FieldError(name, f"The guide has {len(values)} {name}, but {rows} images are drawn; pass one for each.")
    return [value for value in values for _ in range(rows // len(values))]
