"""What the app does with the pipeline: one drawing an event, frame by frame."""

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image

from ..files import file_stem
from ..images.previews import PreviewSchedule
from ..images.reading import UPLOAD_MEGAPIXELS, read_image
from ..images.transforms import center_crop
from ..provenance import in_common, save_png


try:
    from spaces import GPU  # on ZeroGPU, where a device is lent for as long as the function runs
except ImportError:

    def GPU(function: Callable) -> Callable:
        return function


MAX_COUNT = 8
MAX_PROMPT = 500  # characters
MAX_SEED = 2**53 - 1  # what numbers in JSON hold exactly everywhere
SHARE_SIDE = 512  # pixels that an image to share has at least
PREVIEWS = ["every row", "now and then", "off"]
UNDRAWN = (237, 237, 237)  # as in previews


class Studio:
    """The app's events. All of them raise `gr.Error`, which the app shows as a toast.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): What draws.
        name (`str`): What its checkpoint is called in parameters, which everyone can read.
    """

    def __init__(self, pipe: DiffusionPipeline, name: str):
        self.pipe = pipe
        self.name = name
        self.config = pipe.transformer.config
        self._stream = GPU(self._stream)

    def draw(self, condition, guidance_scale, temperature, top_k, top_p, seed, count, preview) -> Iterator[tuple]:
        """Draw images of a prompt or a class."""
        settings = self._settings(guidance_scale, temperature, top_k, top_p)
        yield from self._show(self._condition(condition) | settings, seed, count, preview)

    def complete(
        self, image, keep_rows, condition, guidance_scale, temperature, top_k, top_p, seed, count, preview
    ) -> Iterator[tuple]:
        """Keep the upper rows of an image and draw the others."""
        start = {"image": self._open(image), "keep_rows": int(keep_rows)}
        settings = self._settings(guidance_scale, temperature, top_k, top_p)
        yield from self._show(start | self._condition(condition) | settings, seed, count, preview)

    def keep(self, image, keep_rows) -> tuple[Any, str]:
        """Show what a completion would keep of an image, without the model, so that nobody waits for it."""
        if image is None:
            return gr.update(value=None), ""
        kept = center_crop(self._open(image), self.pipe.image_size)
        top = int(keep_rows) * self.pipe.vq_model.downsample_factor
        kept.paste(UNDRAWN, (0, top, kept.width, kept.height))
        return gr.update(value=[(kept, "kept")], columns=1), "This part is kept." if top else "Nothing of it is kept."

    def _settings(self, guidance_scale, temperature, top_k, top_p) -> dict:
        return {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": int(top_k), "top_p": top_p}

    def _condition(self, condition: str | int | None) -> dict:
        if not self.pipe.is_text_conditional:
            if condition is None:
                raise refusal("Choose a class first.")
            return {"class_labels": condition}
        prompt = (condition or "").strip()
        if not prompt:
            raise refusal("Type what to draw first.")
        if len(prompt) > MAX_PROMPT:
            raise refusal(f"The prompt is too long: it has {len(prompt)} characters, at most {MAX_PROMPT} are read.")
        if self.pipe.text_encoder is not None and (loss := self.pipe.find_loss(prompt)):
            if loss.is_total:
                raise refusal(loss.sentence)
            gr.Warning(loss.sentence)
        return {"prompt": prompt}

    def _open(self, path: str | None) -> Image.Image:
        if path is None:
            raise refusal("Choose an image first.")
        try:
            with open(path, "rb") as file:  # so that nobody is told the name of a temporary file
                return read_image(file, max_megapixels=UPLOAD_MEGAPIXELS)
        except ValueError as error:
            raise refusal(str(error)) from error

    def _show(self, arguments: dict, seed: str | None, count: int, preview: str) -> Iterator[tuple]:
        """Frames of the gallery, a line of status, and in the end the parameters and an image to share."""
        seed = (seed or "").strip()
        if seed and not (seed.isdecimal() and int(seed) <= MAX_SEED):
            raise refusal(
                f"The seed {seed!r} is no whole number from 0 to {MAX_SEED}; leave it empty for a random one."
            )
        first = int(seed) if seed else random.randrange(2**31)
        seeds = [first + i for i in range(int(count))]
        columns = count_columns(len(seeds))
        start = time.perf_counter()
        try:
            with closing(self._stream(arguments, seeds, preview)) as steps:
                for num_drawn, images, parameters in steps:
                    if parameters is None:
                        gallery = facts = share = gr.skip()
                        if images is not None:  # of which the image before had others
                            captions = [f"seed {seed}" for seed in seeds]
                            gallery = gr.update(value=list(zip(images, captions, strict=True)), columns=columns)
                            facts, share = "", gr.update(interactive=False)
                        yield (
                            gallery,
                            f"Row {num_drawn // self.config.grid_size} of {self.config.grid_size}",
                            facts,
                            share,
                        )
        except ValueError as error:
            raise refusal(str(error)) from error
        except Exception as error:  # of which a browser would only be told "Error"
            raise gr.Error("The drawing failed. The app's log says why.") from error
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            gallery = []
            for image, facts in zip(images, parameters, strict=True):
                path = Path(folder) / f"{file_name(arguments)}-{facts['seed']}.png"
                save_png(image, path, facts)
                gallery.append((str(path), f"seed {facts['seed']}"))
            share = Path(folder) / f"{file_name(arguments)}.png"
            save_png(share_image(images), share, in_common(parameters))
            noun = "1 image" if len(images) == 1 else f"{len(images)} images"
            yield (
                gr.update(value=gallery, columns=columns),
                f"{noun} in {seconds:.1f} s",
                json.dumps(parameters[0] if len(parameters) == 1 else parameters, indent=2, ensure_ascii=False),
                gr.update(value=str(share), interactive=True),
            )

    def _stream(
        self, arguments: dict, seeds: list[int], preview: str
    ) -> Iterator[tuple[int, list | None, list | None]]:
        """Codes drawn, images if there are new ones, and in the end parameters.

        These can go from one process to another. There is a step after every row, whether it brings images or not,
        since only between steps a drawing can be stopped.
        """
        side = self.config.grid_size
        schedule = {"every row": PreviewSchedule(side, side), "now and then": PreviewSchedule(None, side), "off": None}
        schedule = schedule[preview]
        steps = self.pipe.stream(
            **arguments,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            preview_every=side,
            output_type="codes",
        )
        with closing(steps):
            for step in steps:
                num_drawn, images, parameters = step.step, None, None
                if step.output is not None:
                    images = self.pipe.decode_codes(step.output.codes)
                    parameters = [facts | self._checkpoint for facts in step.output.parameters]
                elif schedule is not None and schedule.is_due(num_drawn):
                    with schedule.measured():
                        images = self.pipe.preview(step.codes)
                yield num_drawn, images, parameters

    @property
    def _checkpoint(self) -> dict[str, str]:
        """The checkpoint's name in place of its folder, which is of interest on this machine only."""
        return {"checkpoint": self.name} if Path(self.pipe.facts.get("checkpoint", "emoji")).is_dir() else {}


def refusal(sentence: str) -> gr.Error:
    """What is wrong, for a person; the log stays free of it."""
    return gr.Error(sentence.replace("`", ""), print_exception=False)


def file_name(arguments: dict) -> str:
    """The prompt or class as the beginning of a file name."""
    return file_stem(str(arguments.get("prompt", arguments.get("class_labels"))))


def count_columns(count: int) -> int:
    """Images side by side, of which about as many are one above the other."""
    return math.ceil(count**0.5)


def share_image(images: list[Image.Image]) -> Image.Image:
    """All images side by side, large enough to look well where they are shared."""
    columns = count_columns(len(images))
    rows = -(-len(images) // columns)
    side = images[0].width * max(1, -(-SHARE_SIDE // images[0].width))
    tiles = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
    tiles += [Image.new("RGB", (side, side), "white")] * (rows * columns - len(images))
    return make_image_grid(tiles, rows, columns)
