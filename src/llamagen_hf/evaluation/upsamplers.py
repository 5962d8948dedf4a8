"""Comparison of upsamplers by what they make of small images."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..autoencoders import reconstruct
from .images import Images, open_images
from .inception import FeatureExtractor
from .metrics import FeatureStatistics, frechet_distance
from .reconstruction import PerceptualLoss
from .upsampling import Enlarged, enlarge_bicubically, evaluate_upsampling, reduce_images


# Columns of the table: heading, key, and format of the value.
COLUMNS = (
    ("FID", "fid", "{:.2f}"),
    ("PSNR", "psnr", "{:.2f}"),
    ("SSIM", "ssim", "{:.3f}"),
    ("LPIPS", "lpips", "{:.3f}"),
    ("consistency", "consistency", "{:.2f}"),
)


def evaluate_upsampler(
    pipe: DiffusionPipeline,
    images: Images | np.ndarray | list[Image.Image],
    small_size: int,
    autoencoder: nn.Module | None = None,
    prompts: list[str] | None = None,
    extractor: FeatureExtractor | None = None,
    perceptual_loss: PerceptualLoss | None = None,
    batch_size: int = 16,
    count: int | None = None,
    seed: int = 0,
    name: str | None = None,
    progress: bool = True,
    **settings,
) -> dict:
    """Reduce images, enlarge them again, and measure what came of it, beside bicubic enlargement.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): A pipeline of this package that `upsamples`, on its own device.
        images ([`~llamagen_hf.evaluation.images.Images`]): The images, of the pipeline's size, or what
            [`~llamagen_hf.evaluation.images.open_images`] takes without options.
        small_size (`int`): Side of the small images in pixels, a part of the pipeline's size.
        autoencoder (`torch.nn.Module`, *optional*): Encodes and decodes the small images, so that they are as a base
            with this image tokenizer draws them; see [`~llamagen_hf.autoencoders.load_autoencoder`].
        prompts (`list[str]`, *optional*): The prompt of each image, for a pipeline that reads text; none by default.
        extractor ([`~llamagen_hf.evaluation.inception.FeatureExtractor`], *optional*): Adds the Frechet distance
            between the features of the images and of the enlarged ones; FID if they are Inception's.
        perceptual_loss ([`~llamagen_hf.evaluation.reconstruction.PerceptualLoss`], *optional*): Adds LPIPS.
        batch_size (`int`, *optional*, defaults to 16): Images at a time. The last bits may depend on it.
        count (`int`, *optional*): Use only the first `count` images.
        seed (`int`, *optional*, defaults to 0): Image i is enlarged with the seed `seed + i`.
        name (`str`, *optional*): Name of the upsampler; by default its class.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.
        settings: Sampling settings, such as `aug_level`; the pipeline's own by default.

    Returns:
        `dict`: `name`, `images` (their number), and what
        [`~llamagen_hf.evaluation.upsampling.evaluate_upsampling`] returns; with `extractor` also `fid` and
        `fid_bicubic`.

    Raises:
        ValueError: If the pipeline is no upsampler, or a size, the prompts or a setting do not fit it.
    """
    images, name = open_images(images), type(pipe).__name__ if name is None else name
    if not getattr(pipe, "upsamples", False):
        raise ValueError(f"{name} enlarges no images: it is a pipeline of another kind.")
    if not 0 < small_size < pipe.image_size or pipe.image_size % small_size:
        raise ValueError(
            f"The small size is {small_size} pixels; {name} makes {pipe.image_size}, so expected a part of that, such "
            "as half of it."
        )
    if count is not None and not 0 < count <= len(images):
        raise ValueError(f"`count` is {count}; {images.name!r} has {len(images)} images.")
    count = len(images) if count is None else count
    if prompts is not None and pipe.condition_kind != "text":
        raise ValueError(f"{name} reads no prompts; leave them out.")
    if prompts is not None and len(prompts) < count:
        raise ValueError(f"There are {len(prompts)} prompts for {count} images; expected one for each.")
    features = {kind: FeatureStatistics() for kind in ("reference", "fid", "fid_bicubic")}

    def enlarged() -> Iterator[Enlarged]:
        start = 0
        for batch in images.batches(batch_size, count):
            if batch.shape[1:3] != (pipe.image_size, pipe.image_size):
                raise ValueError(
                    f"The images are {batch.shape[2]} x {batch.shape[1]} pixels; {name} makes {pipe.image_size} x "
                    f"{pipe.image_size}."
                )
            pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(pipe.device).float() / 127.5 - 1
            small = reduce_images(pixels, small_size)
            if autoencoder is not None:
                small = reconstruct(autoencoder, small).pixels.float().clamp(-1, 1)
            rows = range(start, start + len(batch))
            asked = {} if prompts is None else {"prompt": prompts[rows.start : rows.stop]}
            generators = [torch.Generator().manual_seed(seed + index) for index in rows]
            sample = pipe.draw_pixels(image=(small + 1) / 2, generator=generators, **asked, **settings)
            if extractor is not None:
                features["reference"].update(extractor(batch).pool)
                for kind, large in (("fid", sample), ("fid_bicubic", enlarge_bicubically(small, pipe.image_size))):
                    rounded = ((large.float() + 1) * 127.5).round().clamp(0, 255).byte()
                    features[kind].update(extractor(rounded.permute(0, 2, 3, 1).cpu().numpy()).pool)
            yield Enlarged(small, sample, pixels)
            start = rows.stop
            bar.update(len(batch))

    with tqdm(total=count, desc=name, unit="image", disable=not progress) as bar:
        values = evaluate_upsampling(enlarged(), pipe.device, perceptual_loss)
    if extractor is not None:
        reference = features.pop("reference")
        values |= {kind: frechet_distance(reference, samples) for kind, samples in features.items()}
    return {"name": name, "images": count} | values


def compare_upsamplers(results: Sequence[dict]) -> str:
    """Write the results of several upsamplers as one Markdown table, bicubic enlargement first.

    Args:
        results (`Sequence[dict]`): What [`evaluate_upsampler`] returned for each, on the same small images.

    Returns:
        `str`: One row per upsampler, with `–` for metrics that were not measured.
    """
    columns = [column for column in COLUMNS if any(column[1] in result for result in results)]
    bicubic = {"name": "bicubic"} | {key: results[0].get(f"{key}_bicubic") for _, key, _ in columns}
    rows = [["upsampler", *(heading for heading, _, _ in columns)], [":--", *["--:"] * len(columns)]]
    for result in [bicubic, *results]:
        values = ("–" if result.get(key) is None else form.format(result[key]) for _, key, form in columns)
        rows.append([result["name"].replace("|", "\\|"), *values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
