"""The app's events: what each does with the pipeline, and what it shows."""

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
from PIL import Image

from ..families import ranks_candidates
from ..files import file_stem
from ..images.grid import image_grid
from ..images.previews import PreviewSchedule
from ..images.reading import UPLOAD_MEGAPIXELS, read_image
from ..images.transforms import center_crop
from ..local_paths import public_name
from ..provenance import in_common, save_png
from .sliders import CANDIDATES_SLIDERS, PRIOR_SLIDERS, SLIDERS, UPSAMPLING_SLIDERS


try:
    from spaces import GPU  # on ZeroGPU, which lends a device for as long as the function runs
except ImportError:

    def GPU(function: Callable) -> Callable:
        return function


MAX_COUNT = 8
MAX_PROMPT = 500  # characters
MAX_SEED = 2**53 - 1  # what numbers in JSON hold exactly everywhere
SHARE_SIDE = 512  # least width of each image in the file to share, in pixels
PREVIEWS = ["every row", "now and then", "off"]
UNDRAWN = (237, 237, 237)  # the grey of previews


class Studio:
    """The app's events. They raise `gr.Error`, which the app shows as a toast.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): The pipeline that generates the images.

    Attributes:
        names (`list[str]`): What `values` of the events are, in this order: settings of a call that the pipeline has,
            `"seed"`, `"count"` and `"preview"`, those of an upsampler, if there is one, and `"num_candidates"`, if
            the pipeline can choose among them.
        prior_names (`list[str]`): Those of a prior, if there is one, which follow in the values of `draw`.
    """

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        known = pipe.sampling_settings()
        self.names = [name for name in SLIDERS if name in known]
        self.names += ["seed", "count", "preview", *(name for name in UPSAMPLING_SLIDERS if name in known)]
        self.names += CANDIDATES_SLIDERS if ranks_candidates(pipe) else []
        self.prior_names = [name for name in PRIOR_SLIDERS if name in known]
        self._stream = GPU(self._stream)

    def draw(self, condition, *values) -> Iterator[tuple]:
        """Generate images of a prompt or a class."""
        yield from self._show(self._condition(condition), values)

    def complete(self, image, keep_rows, condition, *values) -> Iterator[tuple]:
        """Keep the upper rows of an image and generate the others."""
        kept = {"image": self._open(image), "keep_rows": int(keep_rows)}
        yield from self._show(kept | self._condition(condition), values)

    def vary(self, image, *values) -> Iterator[tuple]:
        """Generate images with the content of another."""
        yield from self._show({"variation_of": self._open(image)}, values)

    def keep(self, image, keep_rows) -> tuple[Any, str]:
        """Show what a completion would keep of an image, without the model, so that there is no wait."""
        if image is None:
            return gr.update(value=None), ""
        kept = center_crop(self._open(image), self.pipe.image_size)
        top = int(keep_rows) * self.pipe.image_size // self.pipe.grid_size
        kept.paste(UNDRAWN, (0, top, kept.width, kept.height))
        return gr.update(value=[(kept, "kept")], columns=1), "This part is kept." if top else "Nothing is kept."

    def _condition(self, condition: str | int | None) -> dict:
        if self.pipe.condition_kind == "class":
            if condition is None:
                raise refusal("Choose a class first.")
            return {"class_labels": condition}
        prompt = (condition or "").strip()
        if not prompt:
            raise refusal("Type a prompt first.")
        if len(prompt) > MAX_PROMPT:
            raise refusal(f"The prompt is too long: it has {len(prompt)} characters, at most {MAX_PROMPT} are read.")
        try:
            loss = self.pipe.find_loss(prompt)
        except ValueError as error:  # there is nothing that reads prompts
            raise refusal(str(error)) from error
        if loss is not None:
            if loss.is_total:
                raise refusal(loss.sentence)
            gr.Warning(loss.sentence)
        return {"prompt": prompt}

    def _open(self, path: str | None) -> Image.Image:
        if path is None:
            raise refusal("Choose an image first.")
        try:
            with open(path, "rb") as file:  # so that no message names a temporary file
                return read_image(file, max_megapixels=UPLOAD_MEGAPIXELS)
        except ValueError as error:
            raise refusal(str(error)) from error

    def _show(self, inputs: dict, values: tuple) -> Iterator[tuple]:
        """Yield the gallery, a line of status, and at the end the parameters and a file to share."""
        varies = "variation_of" in inputs
        given = dict(zip(self.names + ([] if varies else self.prior_names), values, strict=True))
        seed, count, preview = (given.pop("seed") or "").strip(), given.pop("count"), given.pop("preview")
        sliders = SLIDERS | UPSAMPLING_SLIDERS | CANDIDATES_SLIDERS | PRIOR_SLIDERS
        whole = {name: int(value) for name, value in given.items() if isinstance(sliders[name].step, int)}
        arguments = given | whole | inputs
        if seed and not (seed.isdecimal() and int(seed) <= MAX_SEED):
            raise refusal(
                f"The seed {seed!r} is not a whole number from 0 to {MAX_SEED}; leave it empty for a random one."
            )
        first = int(seed) if seed else random.randrange(2**31)
        seeds = [first + i for i in range(int(count))]
        columns = math.ceil(len(seeds) ** 0.5)
        start = time.perf_counter()
        try:
            with closing(self._stream(arguments, seeds, preview)) as steps:
                for share_done, images, parameters in steps:
                    if parameters is None:
                        gallery = facts = share = gr.skip()
                        if images is not None:  # the parameters and the file of the images before no longer apply
                            captioned = [(image, f"seed {seed}") for image, seed in zip(images, seeds, strict=True)]
                            gallery, facts = gr.update(value=captioned, columns=columns), ""
                            share = gr.update(interactive=False)
                        yield gallery, f"{share_done:.0%}", facts, share
        except ValueError as error:
            raise refusal(str(error)) from error
        except Exception as error:  # a browser would only be told "Error"
            raise gr.Error("The generation failed. The app's log says why.") from error
        seconds = time.perf_counter() - start
        stem = file_stem(str(inputs.get("prompt", inputs.get("class_labels", "variation"))))
        with tempfile.TemporaryDirectory() as folder:
            gallery, share = [], Path(folder, f"{stem}.png")
            for image, facts in zip(images, parameters, strict=True):
                path = Path(folder, f"{stem}-{facts['seed']}.png")
                save_png(image, path, facts)
                gallery.append((str(path), f"seed {facts['seed']}"))
            side = images[0].width * max(1, -(-SHARE_SIDE // images[0].width))
            save_png(image_grid(images, columns, side), share, in_common(parameters))
            noun = "1 image" if len(images) == 1 else f"{len(images)} images"
            yield (
                gr.update(value=gallery, columns=columns),
                f"{noun} in {seconds:.1f} s",
                json.dumps(parameters[0] if len(parameters) == 1 else parameters, indent=2, ensure_ascii=False),
                gr.update(value=str(share), interactive=True),
            )

    def _stream(
        self, arguments: dict, seeds: list[int], preview: str
    ) -> Iterator[tuple[float, list[Image.Image] | None, list[dict] | None]]:
        """Yield the share of the work that is done, images if there are new ones, and at the end their parameters.

        All of these can be sent from one process to another. There is a step after every row of codes and every step
        of diffusion, whether it has images or not, since a generation can only be stopped between steps.
        """
        schedule = None if preview == "off" else PreviewSchedule(None if preview == PREVIEWS[1] else 1, 1)
        if "variation_of" in arguments:
            arguments = dict(arguments)
            arguments["image_embeds"] = self.pipe.encode_image(arguments.pop("variation_of"))
        steps = self.pipe.stream(
            **arguments,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            preview_every=self.pipe.grid_size or 1,
        )
        with closing(steps):
            for step in steps:
                images = parameters = None
                if step.output is not None:
                    images, parameters = step.images, [without_paths(each) for each in step.output.parameters]
                elif schedule is not None and schedule.is_due(step.step):
                    with schedule.measured():
                        # Of several candidates the first: which is the best is not known yet.
                        images = step.images[:: len(step.images) // len(seeds)]
                yield step.step / step.num_steps, images, parameters


def without_paths(parameters: dict) -> dict:
    """Parameters that name checkpoints without their folders, since everyone can read them."""
    changed = {}
    if "checkpoint" in parameters:
        changed["checkpoint"] = public_name(parameters["checkpoint"])
    if "upsampler" in parameters:
        changed["upsampler"] = without_paths(parameters["upsampler"])
    return parameters | changed


def refusal(sentence: str) -> gr.Error:
    """An error that tells a person what is wrong with their request; it is not logged."""
    return gr.Error(sentence.replace("`", ""), print_exception=False)
