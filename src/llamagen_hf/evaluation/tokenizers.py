"""Comparison of image tokenizers by their reconstructions."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..autoencoders import describe_autoencoder, reconstruct
from .images import Images, open_images
from .inception import FeatureExtractor
from .metrics import FeatureStatistics, frechet_distance
from .reconstruction import PerceptualLoss, ReconstructionMetrics


# Columns of the table: heading, key, and format of the value.
COLUMNS = (
    ("rFID", "rfid", "{:.2f}"),
    ("PSNR", "psnr", "{:.2f}"),
    ("SSIM", "ssim", "{:.3f}"),
    ("LPIPS", "lpips", "{:.3f}"),
    ("usage", "codebook_usage", "{:.1%}"),
    ("perplexity", "codebook_perplexity", "{:,.0f}"),
)


def evaluate_tokenizer(
    autoencoder: nn.Module,
    images: Images | np.ndarray | list[Image.Image],
    extractor: FeatureExtractor | None = None,
    perceptual_loss: PerceptualLoss | None = None,
    batch_size: int = 32,
    count: int | None = None,
    name: str | None = None,
    progress: bool = True,
) -> dict[str, float | int | str | None]:
    """Encode and decode images, and measure the reconstructions.

    PSNR, SSIM and LPIPS are means over images. PSNR is infinite if a reconstruction has no error. SSIM is that of
    Wang et al. 2004, with its Gaussian window, for pixels in [0, 1]; LlamaGen's own script uses a uniform window of
    7 x 7 pixels and a range of 2, which gives higher numbers. For rFID, reconstructions are rounded to 8 bits. For
    continuous latents, the mean of the posterior is decoded.

    Args:
        autoencoder (`torch.nn.Module`): What [`~llamagen_hf.autoencoders.load_autoencoder`] returns. It runs on its
            own device, in its own dtype.
        images ([`~llamagen_hf.evaluation.images.Images`]): The images, or what
            [`~llamagen_hf.evaluation.images.open_images`] takes without options.
        extractor ([`~llamagen_hf.evaluation.inception.FeatureExtractor`], *optional*): Adds rFID, the Frechet distance
            between the features of the images and of their reconstructions; FID if they are Inception's.
        perceptual_loss ([`~llamagen_hf.evaluation.reconstruction.PerceptualLoss`], *optional*): Adds LPIPS.
        batch_size (`int`, *optional*, defaults to 32): Images at a time; the numbers do not depend on it.
        count (`int`, *optional*): Use only the first `count` images.
        name (`str`, *optional*): Name of the tokenizer; by default its class.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        `dict`: `name`, `images` (their number), `downsample_factor`, `codes` (`None` for continuous latents),
        `channels`, `parameters`, `psnr` in dB and `ssim`; `rfid` and `lpips` if requested; with a codebook
        `codebook_usage` in [0, 1] and `codebook_perplexity`.

    Raises:
        ValueError: If the size of the images does not fit the tokenizer, if there are too few, or if a reconstruction
            is not finite.

    Example:

    ```python
    >>> import numpy as np
    >>> from llamagen_hf.autoencoders import load_autoencoder
    >>> from llamagen_hf.evaluation.tokenizers import compare_tokenizers, evaluate_tokenizer

    >>> images = np.full((4, 64, 64, 3), 255, dtype=np.uint8)
    >>> result = evaluate_tokenizer(load_autoencoder("emoji"), images, progress=False)
    >>> print(compare_tokenizers([result]))
    ```
    """
    name = type(autoencoder).__name__ if name is None else name
    images = open_images(images)
    if count is not None and not 0 < count <= len(images):
        raise ValueError(f"`count` is {count}; {images.name!r} has {len(images)} images.")
    facts = describe_autoencoder(autoencoder)
    metrics = ReconstructionMetrics(facts.codes, autoencoder.device, perceptual_loss)
    reference, samples = FeatureStatistics(), FeatureStatistics()
    with tqdm(total=count or len(images), desc=name, unit="image", disable=not progress) as bar:
        for batch in images.batches(batch_size, count):
            height, width = batch.shape[1:3]
            if facts.image_size is not None and (height, width) != (facts.image_size, facts.image_size):
                side = facts.image_size
                raise ValueError(f"The images are {width} x {height} pixels; {name} takes {side} x {side} only.")
            if height % facts.downsample_factor or width % facts.downsample_factor:
                raise ValueError(
                    f"The images are {width} x {height} pixels; for {name} both sides must be multiples of "
                    f"{facts.downsample_factor}."
                )
            pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(autoencoder.device).float() / 127.5 - 1
            result = reconstruct(autoencoder, pixels)
            if not result.pixels.isfinite().all():
                raise ValueError(f"{name} gives NaN or infinity in {autoencoder.dtype}; try float32.")
            metrics.add(pixels, result.pixels, result.codes)
            if extractor is not None:
                rounded = ((result.pixels.float() + 1) * 127.5).round().clamp(0, 255).byte()
                reference.update(extractor(batch).pool)
                samples.update(extractor(rounded.permute(0, 2, 3, 1).cpu().numpy()).pool)
            bar.update(len(batch))
    values = {
        "name": name,
        "images": int(metrics.sums[0]),
        "downsample_factor": facts.downsample_factor,
        "codes": facts.codes,
        "channels": facts.channels,
        "parameters": facts.parameters,
    }
    if extractor is not None:
        values["rfid"] = frechet_distance(reference, samples)
    return values | metrics.compute()


def compare_tokenizers(results: Sequence[dict]) -> str:
    """Write the results of several tokenizers as one Markdown table.

    Args:
        results (`Sequence[dict]`): What [`evaluate_tokenizer`] returned for each, on the same images.

    Returns:
        `str`: One row per tokenizer, with `–` for metrics that were not measured.

    Raises:
        ValueError: If the results are of different numbers of images.
    """
    counts = [result["images"] for result in results]
    if len(set(counts)) != 1:
        raise ValueError(f"Only results on the same images can be compared; these are on {counts} images.")
    rows = [
        ["tokenizer", "factor", "codes or channels", "parameters", *(heading for heading, _, _ in COLUMNS)],
        [":--", *["--:"] * (3 + len(COLUMNS))],
    ]
    for result in results:
        latents = f"{result['channels']} channels" if result["codes"] is None else f"{result['codes']:,} codes"
        values = (form.format(result[key]) if key in result else "–" for _, key, form in COLUMNS)
        name = result["name"].replace("|", "\\|")
        rows.append([name, str(result["downsample_factor"]), latents, f"{result['parameters'] / 1e6:.1f}M", *values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
