"""Make the images of the README and the docs.

python docs/make_images.py      # needs the test dependencies, and chromium for the screenshots
"""

import shutil
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from playwright.sync_api import sync_playwright

from llamagen_hf import AutoregressiveImagePipeline
from llamagen_hf.demo import build_demo, launch


IMAGES = Path(__file__).parent / "images"
PROMPTS = ["a red apple", "a red heart", "a cat", "person, noto style", "grinning face", "a house"]  # seeds 0 to 5
SIDE = 112


def animate() -> None:
    """Write an animation of six images that appear code by code."""
    pipe = AutoregressiveImagePipeline.from_pretrained()
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    steps = pipe.stream(PROMPTS, generator=seeds, preview_every=2)
    frames = []
    for step in steps:
        tiles = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in step.images]
        frames.append(make_image_grid(tiles, 1, len(tiles)).quantize(256))
    durations = [90] * (len(frames) - 1) + [2500]
    frames[0].save(
        IMAGES / "preview.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True
    )


def photograph() -> None:
    """Write screenshots of the app: on a desktop during a generation, and on a phone."""
    demo = build_demo()
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, width, height, scale in (("space", 1100, 690, 1), ("space_phone", 390, 760, 2)):
            page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
            page.goto(f"{url}?__theme=light")
            page.get_by_label("Prompt").first.wait_for()
            page.wait_for_timeout(1000)
            page.get_by_role("button", name="Settings").first.click()
            page.wait_for_timeout(500)
            page.get_by_label("number input for Images").first.fill("4")
            page.get_by_label("Seed").first.fill("0")
            page.get_by_label("Seed").first.press("Tab")
            page.get_by_role("button", name="Settings").first.click()
            page.get_by_label("Prompt").first.fill("sun with face")
            page.get_by_label("Prompt").first.press("Enter")
            status = "(50|6.|75)%" if name == "space" else "4 images in"
            page.wait_for_function(f"() => /{status}/.test(document.querySelector('.status').innerText)")
            page.wait_for_timeout(0 if name == "space" else 400)
            page.screenshot(path=IMAGES / f"{name}.png")
        browser.close()
    demo.close()
    for name in ("space", "space_phone"):
        with Image.open(IMAGES / f"{name}.png") as image:
            image.convert("RGB").quantize(256).save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    animate()
    photograph()
