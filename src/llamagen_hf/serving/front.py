"""The pipeline without its generator: what comes before the engine and what comes after it."""

import io
from dataclasses import dataclass

import torch
from PIL import Image

from ..llamagen.configuration import LlamaGenConfig
from ..llamagen.modeling import LlamaGenForConditionalGeneration
from ..llamagen.pipeline import AutoregressiveImagePipeline
from ..llamagen.preview import decode_partly
from ..provenance import write_png


MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class FrontPipeline(AutoregressiveImagePipeline):
    """A pipeline whose transformer has a configuration and no weights; the engine has them."""

    @property
    def device(self) -> torch.device:
        # By the base class it may be the transformer's, which is nowhere.
        return self.vq_model.device

    def _warn_of_losses(self, prompts: list[str]) -> None:
        """A server tells its client instead; prompts are not for its log."""


def load_front(checkpoint: str | None, device: str, dtype: torch.dtype) -> tuple[FrontPipeline, str]:
    """Load a checkpoint's tokenizer and text encoder.

    Args:
        checkpoint (`str`, *optional*): As for [`AutoregressiveImagePipeline.from_pretrained`].
        device (`str`): Where they work.
        dtype (`torch.dtype`): Of their weights.

    Returns:
        The pipeline, and the folder of the generator for the engine to load.

    Raises:
        OSError: In one sentence, if there is no such checkpoint.
    """
    folder = FrontPipeline.find_checkpoint(checkpoint)
    with torch.device("meta"):
        transformer = LlamaGenForConditionalGeneration(LlamaGenConfig.from_pretrained(folder / "transformer"))
    pipe = FrontPipeline.from_pretrained(checkpoint, transformer=transformer.to(dtype).eval(), dtype=dtype)
    for component in (pipe.vq_model, pipe.text_encoder):
        if component is not None:
            component.to(device)
    return pipe, str(folder / "transformer")


@dataclass(frozen=True)
class ImageFile:
    """How an image is written.

    Args:
        format (`str`, *optional*, defaults to `"png"`): Or "jpeg" or "webp".
        quality (`int`, *optional*, defaults to 100): From 0 to 100, for the latter two.
        side (`int`, *optional*): Pixels to scale it to.
    """

    format: str = "png"
    quality: int = 100
    side: int | None = None

    def write(self, image: Image.Image, parameters: dict) -> bytes:
        """The file; a PNG says what made it."""
        file = io.BytesIO()
        if self.side is not None:
            image = image.resize((self.side, self.side), Image.Resampling.LANCZOS)
        if self.format == "png":
            write_png(image, file, parameters)
        else:
            image.save(file, self.format, quality=self.quality)
        return file.getvalue()


@dataclass(frozen=True)
class Development:
    """Codes to make an image of: all of them, or the first ones for a preview."""

    codes: list[int]
    file: ImageFile
    parameters: dict


class Darkroom:
    """Makes files of codes.

    Args:
        pipe ([`FrontPipeline`]): Has the decoder.
    """

    def __init__(self, pipe: FrontPipeline):
        self.pipe = pipe

    @torch.no_grad()
    def develop(self, items: list[Development]) -> list[bytes]:
        """One file for each."""
        config, vq_model = self.pipe.transformer.config, self.pipe.vq_model
        # On a CPU a batch saves little, and its size changes the last bits of every image in it.
        alone = vq_model.device.type == "cpu"
        groups: dict[tuple, list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault((len(item.codes), index if alone else 0), []).append(index)
        files: list[bytes] = [b""] * len(items)
        for (length, _), members in groups.items():
            codes = torch.tensor([items[i].codes for i in members], device=vq_model.device)
            if length == config.num_codes:
                pixels = vq_model.decode_codes(codes.unflatten(1, (config.grid_size, config.grid_size)))
            else:
                pixels = decode_partly(vq_model, codes, config.grid_size)
            images = self.pipe.image_processor.postprocess(pixels, output_type="pil")
            for i, image in zip(members, images, strict=True):
                files[i] = items[i].file.write(image, items[i].parameters)
        return files


class PromptEncoder:
    """Text states of prompts, each prompt once.

    Args:
        pipe ([`FrontPipeline`]): Has the text encoder.
    """

    def __init__(self, pipe: FrontPipeline):
        self.pipe = pipe

    def encode(self, prompts: list[str]) -> list[tuple[torch.Tensor, torch.LongTensor]]:
        """States `(condition_length, condition_dim)` and mask `(condition_length,)` for each."""
        unique = list(dict.fromkeys(prompts))
        # On a CPU the same holds as for the decoder.
        alone = self.pipe.vq_model.device.type == "cpu"
        encoded = {}
        for group in [[prompt] for prompt in unique] if alone else [unique]:
            embeds, mask = self.pipe.encode_prompt(group)
            embeds = embeds.to(self.pipe.transformer.dtype)
            encoded |= dict(zip(group, zip(embeds.cpu(), mask.cpu(), strict=True), strict=True))
        return [encoded[prompt] for prompt in prompts]
