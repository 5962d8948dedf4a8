"""Images laid out in a grid."""

from PIL import Image

from llamagen_hf.images.grid import image_grid


COLOURS = ["red", "green", "blue", "yellow", "black"]


def squares(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), colour) for colour in COLOURS[:count]]


def test_images_are_laid_out_row_by_row_and_the_rest_is_white():
    grid = image_grid(squares(5))
    assert grid.size == (12, 8)
    assert [grid.getpixel(place) for place in ((1, 1), (5, 1), (9, 1), (1, 5), (5, 5), (9, 5))] == [
        (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255),
    ]  # fmt: skip


def test_columns_and_side():
    assert image_grid(squares(3), columns=2, side=10).size == (20, 20)
    assert image_grid(squares(3), columns=8).size == (12, 4)  # no empty columns
    assert image_grid(squares(1)).tobytes() == squares(1)[0].tobytes()


def test_captions_stand_below_their_images():
    grid = image_grid(squares(2), side=64, captions=["a red square", 7])
    assert grid.size == (2 * 72, 108)
    assert grid.getpixel((40, 40)) == (255, 0, 0) and grid.getpixel((1, 1)) == (255, 255, 255)
    below = grid.crop((0, 70, 72, 108)).convert("L")
    assert below.getextrema()[0] < 128 and len(image_grid(squares(1), captions=["word " * 50]).getbbox()) == 4
