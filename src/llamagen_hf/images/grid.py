"""Images with their prompts below them, on one sheet."""

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont


SIDE = 128  # of an image on the sheet, in pixels
BATCH = 64  # images drawn together


def contact_sheet(pipe: DiffusionPipeline, conditions: list[str | int], columns: int = 10) -> Image.Image:
    """Draw one image for each prompt or class, with the seeds 0, 1, 2, ...

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): What draws, with the checkpoint's own sampling settings.
        conditions (`list[str | int]`): Prompts, or classes by id or name.
        columns (`int`, *optional*, defaults to 10): Images side by side.

    Returns:
        `PIL.Image.Image`: The images, [`SIDE`] pixels wide, with up to three lines of text below each.
    """
    font, tiles = ImageFont.load_default(10), []
    for start in range(0, len(conditions), BATCH):
        part = conditions[start : start + BATCH]
        condition = {"prompt": part} if pipe.is_text_conditional else {"class_labels": part}
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images = pipe(**condition, generator=generators).images
        for image, text in zip(images, part, strict=True):
            tile = Image.new("RGB", (SIDE + 8, SIDE + 44), "white")
            tile.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (4, 4))
            draw, lines = ImageDraw.Draw(tile), [""]
            for word in str(text).split():
                longer = f"{lines[-1]} {word}".strip()
                if draw.textlength(longer, font) <= SIDE:
                    lines[-1] = longer
                else:
                    lines.append(word)
            draw.multiline_text((4, SIDE + 6), "\n".join(lines[:3]), "black", font, spacing=1)
            tiles.append(tile)
    columns = min(columns, len(tiles))
    blanks = [Image.new("RGB", tiles[0].size, "white")] * (-len(tiles) % columns)
    return make_image_grid(tiles + blanks, -(-len(tiles) // columns), columns)
