"""Images laid out in a grid, with or without captions."""

import math

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont


CAPTION_LINES = 3


def image_grid(
    images: list[Image.Image],
    columns: int | None = None,
    side: int | None = None,
    captions: list[str | int] | None = None,
) -> Image.Image:
    """Lay images out row by row; places that are left over at the end are white.

    Args:
        images (`list[PIL.Image.Image]`): At least one, all of one size.
        columns (`int`, *optional*): Images in a row, by default about as many as there are rows.
        side (`int`, *optional*): Width and height in pixels to scale each image to; by default they stay as they are.
        captions (`list[str | int]`, *optional*): Text below each image, up to three lines of it.
    """
    columns = min(columns or math.ceil(len(images) ** 0.5), len(images))
    if side is not None:
        images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
    if captions is not None:
        images = [_with_caption(image, str(text)) for image, text in zip(images, captions, strict=True)]
    blanks = [Image.new("RGB", images[0].size, "white")] * (-len(images) % columns)
    return make_image_grid([*images, *blanks], -(-len(images) // columns), columns)


def _with_caption(image: Image.Image, text: str) -> Image.Image:
    """An image with a white margin and its caption below it, broken between words."""
    font, lines = ImageFont.load_default(10), [""]
    tile = Image.new("RGB", (image.width + 8, image.height + 44), "white")
    tile.paste(image, (4, 4))
    draw = ImageDraw.Draw(tile)
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= image.width:
            lines[-1] = longer
        else:
            lines.append(word)
    draw.multiline_text((4, image.height + 6), "\n".join(lines[:CAPTION_LINES]), "black", font, spacing=1)
    return tile
