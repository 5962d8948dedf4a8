"""Generation of many images to measure: the same images on one process, on many, and after a restart."""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DiTPipeline
from PIL import Image
from tqdm.auto import tqdm

from ..arguments import is_count, plain
from ..data.fingerprint import INPUTS_FILE, claim_inputs, fingerprint_pipeline
from ..files import replacing, write_json
from ..processes import on_main_process, this_process
from .images import open_images
from .npz import write_images


ClassChoice = Literal["random", "balanced"]

SETTINGS_FILE = "sampling.json"
IMAGE = re.compile(r"\d{6,}\.png|\.\d{6,}\.png\.\d+(\.partial)?")  # complete, or left by a killed process
PLACES = ("checkpoint", "revision", "variant")  # may change: the weights are compared by content


@dataclass
class SamplingConfig:
    """How to generate images for an evaluation.

    Args:
        count (`int`): Number of images.
        prompts (`list[str]`, *optional*): The prompts, repeated until there are `count`. By default classes.
        classes (`str`, *optional*, defaults to `"random"`): `"random"` chooses each image's class by its own seed;
            `"balanced"` takes 0, 1, 2, ... in turn.
        num_classes (`int`, *optional*): Number of classes; by default that of the pipeline, if it states one.
        image_size (`int`, *optional*): Side in pixels to resize images to, bicubically, as LlamaGen does from 384 to
            256.
        batch_size (`int`, *optional*, defaults to 32): Images generated together. Their last bits may depend on it.
        seed (`int`, *optional*, defaults to 0): Image i is generated with the seed `seed + i`.
        arguments (`dict`, *optional*): More arguments for the pipeline's call, such as `guidance_scale`, `top_k` or
            `num_inference_steps`.
        overwrite (`bool`, *optional*, defaults to `False`): Replace what an earlier run generated into the folder.

    Raises:
        ValueError: If a value is out of range.
    """

    count: int
    prompts: list[str] | None = None
    classes: ClassChoice = "random"
    num_classes: int | None = None
    image_size: int | None = None
    batch_size: int = 32
    seed: int = 0
    arguments: dict = field(default_factory=dict)
    overwrite: bool = False

    def __post_init__(self):
        for name in ("count", "batch_size", "num_classes", "image_size", "seed"):
            setattr(self, name, plain(getattr(self, name)))
        self.arguments = {name: plain(value) for name, value in self.arguments.items()}
        for name in ("count", "batch_size"):
            value = getattr(self, name)
            if not is_count(value):
                raise ValueError(f"`{name}` is {value}; expected an integer of at least 1.")
        if self.classes not in get_args(ClassChoice):
            raise ValueError(f"`classes` is {self.classes!r}; expected 'random' or 'balanced'.")
        if self.prompts is not None and not self.prompts:
            raise ValueError("`prompts` is empty.")


def sample_images(pipe: DiffusionPipeline, config: SamplingConfig, folder: str | Path, progress: bool = True) -> Path:
    """Generate images into a folder, each as `000123.png`, on every process that Accelerate runs.

    Image i depends on its index, not on the process that generates it: batches are cut from the indices, and each
    process takes whole batches. So one process and eight write the same files, and a run that was killed continues
    with the incomplete batches, provided that the pipeline is still the same.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): Any pipeline that takes `prompt` or `class_labels`, and `generator`;
            one of this package may also draw without a condition.
        config ([`SamplingConfig`]): What to generate.
        folder (`str` or `os.PathLike`): Where to write. Settings and fingerprints of all weights are stored there;
            later runs with others are refused.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar on the first process.

    Returns:
        `Path`: The folder, complete once all processes have arrived here.

    Raises:
        ValueError: If the pipeline can't generate from these conditions, or the folder holds images of other settings
            or other weights.
    """
    state, folder = this_process(), Path(folder)
    conditions = _conditions(pipe, config)
    on_main_process(lambda: _claim_folder(folder, pipe, config))
    starts = range(0, config.count, config.batch_size)[state.process_index :: state.num_processes]
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(starts, unit="batch", disable=not (progress and state.is_main_process)):
        indices = range(start, min(start + config.batch_size, config.count))
        paths = [folder / f"{index:06d}.png" for index in indices]
        if not all(path.is_file() for path in paths):
            for path, image in zip(paths, _generate(pipe, config, indices, conditions), strict=True):
                with replacing(path) as partial:
                    Image.fromarray(image).save(partial, format="PNG")
    state.wait_for_everyone()
    return folder


def pack_images(folder: str | Path, path: str | Path) -> None:
    """Write the images of [`sample_images`] as the `.npz` of ADM's evaluator, in the order of their indices.

    Raises:
        OSError: If the folder is not one of [`sample_images`], or the file can't be written.
        ValueError: If images are missing.
    """
    folder = Path(folder)
    count = read_settings(folder)["count"]
    images = open_images(folder)
    if len(images) != count:
        raise ValueError(f"{folder.name!r} holds {len(images)} of {count} images; generate the others first.")
    write_images(path, images, count)


def read_settings(folder: str | Path) -> dict:
    """The settings that [`sample_images`] stored in a folder; an `OSError` if it did not write there."""
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise OSError(f"{str(folder)!r} holds no images that were generated for an evaluation.")
    return json.loads(path.read_text(encoding="utf-8"))


def _claim_folder(folder: Path, pipe: DiffusionPipeline, config: SamplingConfig) -> None:
    """Store the settings, or raise a `ValueError` if the images in the folder have other ones."""
    origin = pipe.facts if hasattr(pipe, "facts") else {"checkpoint": pipe.config.get("_name_or_path")}
    settings = json.loads(json.dumps(asdict(config) | {"pipeline": type(pipe).__name__} | origin, default=str))
    del settings["overwrite"]
    path = folder / SETTINGS_FILE
    if path.is_file() and config.overwrite:
        for file in folder.iterdir():
            if IMAGE.fullmatch(file.name):
                file.unlink()
        path.unlink()  # after the images, so that they always have settings
        (folder / INPUTS_FILE).unlink(missing_ok=True)
    is_begun = path.is_file()
    if is_begun:
        stored = read_settings(folder)
        changed = {name for name in settings | stored if settings.get(name) != stored.get(name)} - set(PLACES)
        if changed:
            raise ValueError(
                f"{str(folder)!r} holds images generated with another {', '.join(sorted(changed))}; take another "
                "folder, or start over with --overwrite."
            )
    elif folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty and holds no images that were generated for an evaluation.")
    claim_inputs(folder, fingerprint_pipeline(pipe), goes_on=is_begun)
    write_json(path, settings)


def _accepted_arguments(pipe: DiffusionPipeline) -> set[str]:
    """Names of the arguments of a pipeline's call, also of those that it passes on to a pipeline within it."""
    parameters = inspect.signature(pipe.__call__).parameters
    names = set(parameters) | set(pipe.sampling_settings() if hasattr(pipe, "sampling_settings") else ())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        parts = (part for part in pipe.components.values() if isinstance(part, DiffusionPipeline))
        names = names.union(*map(_accepted_arguments, parts))
    return names


def _conditions(pipe: DiffusionPipeline, config: SamplingConfig) -> Callable[[int], dict]:
    """A function from the index of an image to its condition, as an argument of the pipeline's call."""
    accepted, name = _accepted_arguments(pipe), type(pipe).__name__
    if unknown := sorted(set(config.arguments) - accepted):
        raise ValueError(f"{name} does not take {', '.join(unknown)}.")
    if getattr(pipe, "upsamples", False):
        raise ValueError(f"{name} enlarges images; measure it with `llamagen compare-upsamplers`.")
    kind = getattr(pipe, "condition_kind", None)
    if config.prompts is not None and kind == "none":
        raise ValueError(f"{name} reads no text; leave the prompts out.")
    if config.prompts is not None:
        if "prompt" not in accepted or kind not in (None, "text"):
            raise ValueError(f"{name} does not take prompts; leave them out to generate classes.")
        return lambda index: {"prompt": config.prompts[index % len(config.prompts)]}
    if kind == "none":
        return lambda index: {}
    if "class_labels" not in accepted or kind not in (None, "class"):
        raise ValueError(f"{name} does not take classes; give it prompts.")
    num_classes = config.num_classes or getattr(pipe, "num_classes", None)
    if num_classes is None and isinstance(pipe, DiTPipeline):
        num_classes = pipe.transformer.config.num_embeds_ada_norm
    if num_classes is None:
        raise ValueError(f"{name} does not state its number of classes; set `num_classes`.")

    def class_of(index: int) -> dict:
        if config.classes == "balanced":
            return {"class_labels": index % num_classes}
        generator = torch.Generator().manual_seed(config.seed + index)
        return {"class_labels": int(torch.randint(num_classes, (), generator=generator))}

    return class_of


@torch.no_grad()
def _generate(
    pipe: DiffusionPipeline, config: SamplingConfig, indices: range, conditions: Callable[[int], dict]
) -> np.ndarray:
    """Images `(n, height, width, 3)`, uint8."""
    given = [conditions(index) for index in indices]
    arguments = {name: [one[name] for one in given] for name in given[0]} | config.arguments
    if not given[0]:
        arguments["num_images_per_prompt"] = len(given)
    arguments["generator"] = [torch.Generator().manual_seed(config.seed + index) for index in indices]
    if hasattr(pipe, "draw_pixels"):
        pixels = pipe.draw_pixels(**arguments)
    else:
        pixels = pipe(**arguments, output_type="np").images
        pixels = torch.from_numpy(np.asarray(pixels)).permute(0, 3, 1, 2).float() * 2 - 1
    if config.image_size is not None and pixels.shape[-1] != config.image_size:
        pixels = F.interpolate(pixels, size=(config.image_size, config.image_size), mode="bicubic")
    pixels = (pixels * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # rounds to the nearest
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
