"""Pack the trained upsampler of the emoji checkpoint as the one that ships with the package.

python pipelines/ship_upsampler.py [--run runs/emoji/upsampler] [--dataset runs/emoji/data] [--output FOLDER]

The weights are saved in half precision. The card's numbers and the sheet come from those weights; the sheet shows the
base's images beside the enlarged ones.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from PIL import Image

from llamagen_hf import AutoregressiveImagePipeline, CascadePipeline, PixelDiffusionPipeline
from llamagen_hf.data.loader import batches_once
from llamagen_hf.data.samples import ImageSamples, stack_images
from llamagen_hf.data.source import DataConfig
from llamagen_hf.diffusion.training.small_images import SmallImages
from llamagen_hf.evaluation.upsampling import Enlarged, evaluate_upsampling
from llamagen_hf.images.grid import image_grid
from llamagen_hf.loading.checkpoint import SHIPPED
from llamagen_hf.publishing.publications import SHEET


PROMPTS = [
    "a red apple", "a red heart", "sun with face", "grinning face", "a cat", "a dog", "flag: france", "full moon",
    "a blue heart", "a house", "a tree", "person, noto style",
]  # fmt: skip


TEST_IMAGES, BATCH_SIZE = 64, 32


def measure(upsampler: PixelDiffusionPipeline, data: DataConfig, base_size: int) -> dict[str, float]:
    """PSNR and SSIM beside those of bicubic enlargement, of reduced test images and of redrawn ones."""
    small_images, found = SmallImages(base_size, data.image_size, "emoji"), {}
    rows = data.load("test")
    rows = rows.select([i * len(rows) // TEST_IMAGES for i in range(TEST_IMAGES)])
    batches = [batch["images"] for batch in batches_once(rows, ImageSamples(data), stack_images, BATCH_SIZE)]
    for kind, is_redrawn in (("reduced", False), ("redrawn", True)):
        enlarged = []
        for start, images in zip(range(0, TEST_IMAGES, BATCH_SIZE), batches, strict=True):
            small = small_images(images, torch.full((len(images),), is_redrawn))
            seeds = [torch.Generator().manual_seed(start + i) for i in range(len(images))]
            enlarged.append(Enlarged(small, upsampler.draw_pixels(image=(small + 1) / 2, generator=seeds), images))
        scores = evaluate_upsampling(enlarged, torch.device("cpu"))
        found |= {f"{kind}_{name}": value for name, value in scores.items()}
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--run", type=Path, default=Path("runs/emoji/upsampler"), help="What train-diffusion saved."
    )
    arguments.add_argument("--dataset", default="runs/emoji/data", help="The emoji, as split_emoji.py wrote them.")
    arguments.add_argument("--output", type=Path, default=SHIPPED / "emoji_upsampler", help="Replaced, if it exists.")
    own = arguments.parse_args()

    partial_output = own.output.with_name(f".{own.output.name}-new")
    shutil.rmtree(partial_output, ignore_errors=True)
    PixelDiffusionPipeline.from_pretrained(own.run).to(torch.float16).save_pretrained(partial_output)
    upsampler = PixelDiffusionPipeline.from_pretrained(partial_output)

    cascade, pairs = CascadePipeline(AutoregressiveImagePipeline.from_pretrained(), upsampler), []
    for seed, prompt in enumerate(PROMPTS):
        output = cascade(prompt, generator=torch.Generator().manual_seed(seed))
        side = upsampler.image_size
        pairs += [output.base.images[0].resize((side, side), Image.Resampling.BICUBIC), output.images[0]]
    captions = [text for prompt in PROMPTS for text in (f"{prompt}, 64 px", "upsampled")]
    image_grid(pairs, 6, captions=captions).quantize(256).save(partial_output / SHEET, optimize=True)

    settings = json.loads((own.run / "training.json").read_text(encoding="utf-8"))["diffusion"]["settings"]
    facts = measure(upsampler, DataConfig(own.dataset, image_size=side), cascade.base.image_size)
    facts |= settings | upsampler.sampling_settings()
    facts["parameters"] = sum(p.numel() for p in upsampler.unet.parameters()) / 1e6
    card = (Path(__file__).parent / "emoji_upsampler_card.md").read_text(encoding="utf-8")
    (partial_output / "README.md").write_text(card.format(**facts), encoding="utf-8")
    shutil.rmtree(own.output, ignore_errors=True)
    partial_output.rename(own.output)


if __name__ == "__main__":
    main()
