"""Drawing many images to measure: the same ones on one process and on many, and after a restart."""

import inspect
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DiTPipeline
from PIL import Image
from tqdm.auto import tqdm

from ..arguments import is_count, plain
from ..data.fingerprint import INPUTS_FILE, claim_inputs, fingerprint_pipeline
from ..processes import on_main_process, this_process
from .images import open_images
from .npz import write_images


SETTINGS_FILE = "sampling.json"
IMAGE = re.compile(r"\d{6,}\.png|\.\d{6,}\.png\.\d+")  # complete, and begun by a process
PLACES = ("checkpoint", "revision", "variant")  # the same weights elsewhere are as good


@dataclass
class SamplingConfig:
    """How to draw images for an evaluation.

    Args:
        count (`int`): How many images.
        prompts (`list[str]`, *optional*): What to draw, over and over until there are `count`. By default classes.
        classes (`str`, *optional*, defaults to `"random"`): `"random"` draws each image's class by its own seed;
            `"balanced"` takes 0, 1, 2, ... in turn.
        num_classes (`int`, *optional*): How many there are; our own pipelines and DiT's know it themselves.
        image_size (`int`, *optional*): Side to bring images to, bicubically, as LlamaGen does from 384 to 256.
        batch_size (`int`, *optional*, defaults to 32): Images drawn together. Their last bits may depend on it.
        seed (`int`, *optional*, defaults to 0): Image i draws with the seed `seed + i`.
        arguments (`dict`, *optional*): More for the pipeline's call, such as `guidance_scale`, `top_k` or
            `num_inference_steps`.
        overwrite (`bool`, *optional*, defaults to `False`): Draw anew what an earlier run drew into the folder.
    """

    count: int
    prompts: list[str] | None = None
    classes: str = "random"
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
        if self.classes not in ("random", "balanced"):
            raise ValueError(f"`classes` is {self.classes!r}; expected 'random' or 'balanced'.")
        if self.prompts is not None and not self.prompts:
            raise ValueError("`prompts` is empty.")


def sample_images(pipe: DiffusionPipeline, config: SamplingConfig, folder: str | Path, progress: bool = True) -> Path:
    """Draw images into a folder, each as `000123.png`, on every process that Accelerate runs.

    What image i shows depends on its index, not on the process that draws it: batches are cut from the indices, and
    shared out among processes as wholes. So one process and eight write the same files, and a run that was killed goes
    on with the batches that are not complete, if the pipeline is still the same.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): Ours, or any that takes `prompt` or `class_labels`, and `generator`.
        config ([`SamplingConfig`]): What to draw.
        folder (`str` or `os.PathLike`): Where to. Settings and fingerprints of all weights are noted there, and others
            are refused later.
        progress (`bool`, *optional*, defaults to `True`): Show a bar with the time left, on the first process.

    Returns:
        `Path`: The folder, complete once all processes are here.

    Raises:
        ValueError: In one sentence, if the pipeline can't draw that, or the folder holds images of other settings or
            other weights.
    """
    state, folder = this_process(), Path(folder)
    conditions = _conditions(pipe, config)
    on_main_process(lambda: _claim_folder(folder, pipe, config))
    starts = range(0, config.count, config.batch_size)
    mine = [start for turn, start in enumerate(starts) if turn % state.num_processes == state.process_index]
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(mine), unit="batch", disable=not (progress and state.is_main_process)) as bar:
        for start in mine:
            indices = range(start, min(start + config.batch_size, config.count))
            paths = [folder / f"{index:06d}.png" for index in indices]
            if not all(path.is_file() for path in paths):
                for path, image in zip(paths, _draw(pipe, config, indices, conditions), strict=True):
                    partial = path.with_name(f".{path.name}.{os.getpid()}")
                    Image.fromarray(image).save(partial, format="PNG")
                    partial.replace(path)
            bar.update()
    state.wait_for_everyone()
    return folder


def pack_images(folder: str | Path, path: str | Path) -> None:
    """Write what [`sample_images`] drew as the `.npz` of ADM's evaluator, in the order of indices.

    Raises:
        OSError or ValueError: In one sentence, if the folder is not complete, or the file can't be written.
    """
    folder = Path(folder)
    count = read_settings(folder)["count"]
    images = open_images(folder)
    if len(images) != count:
        raise ValueError(f"{folder.name!r} holds {len(images)} of {count} images; draw the others first.")
    write_images(path, images, count)


def read_settings(folder: str | Path) -> dict:
    """What [`sample_images`] noted about the images of a folder; an `OSError` if it is no such folder."""
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise OSError(f"{str(folder)!r} holds no images that were drawn for an evaluation.")
    return json.loads(path.read_text(encoding="utf-8"))


def _claim_folder(folder: Path, pipe: DiffusionPipeline, config: SamplingConfig) -> None:
    """Note what the images are drawn with, or raise a `ValueError` if those in the folder were drawn otherwise."""
    origin = pipe.facts if hasattr(pipe, "facts") else {"checkpoint": pipe.config.get("_name_or_path")}
    settings = json.loads(json.dumps(asdict(config) | {"pipeline": type(pipe).__name__} | origin, default=str))
    del settings["overwrite"]
    path = folder / SETTINGS_FILE
    if path.is_file() and config.overwrite:
        for file in folder.iterdir():
            if IMAGE.fullmatch(file.name):
                file.unlink()
        path.unlink()  # after the images, which are its own all the time
        (folder / INPUTS_FILE).unlink(missing_ok=True)
    is_begun = path.is_file()
    if is_begun:
        noted = read_settings(folder)
        changed = [name for name in settings.keys() | noted if settings.get(name) != noted.get(name)]
        if changed := sorted(set(changed) - set(PLACES)):
            raise ValueError(
                f"{str(folder)!r} holds images drawn with another {', '.join(changed)}; take another folder, or "
                "start over with --overwrite."
            )
    elif folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty and holds no images that were drawn for an evaluation.")
    claim_inputs(folder, fingerprint_pipeline(pipe), goes_on=is_begun)
    partial = folder / f".{SETTINGS_FILE}"
    partial.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


def _conditions(pipe: DiffusionPipeline, config: SamplingConfig) -> Callable[[int], dict]:
    """Which argument of the pipeline's call says what image i shows, and what it says."""
    accepted = inspect.signature(pipe.__call__).parameters
    if unknown := sorted(set(config.arguments) - set(accepted)):
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}.")
    if config.prompts is not None:
        if "prompt" not in accepted or getattr(pipe, "condition_kind", "text") != "text":
            raise ValueError(f"{type(pipe).__name__} draws no prompts; leave them out to draw classes.")
        return lambda index: {"prompt": config.prompts[index % len(config.prompts)]}
    if "class_labels" not in accepted or getattr(pipe, "condition_kind", "class") != "class":
        raise ValueError(f"{type(pipe).__name__} draws no classes; give it prompts.")
    num_classes = config.num_classes
    if num_classes is None:
        num_classes = getattr(pipe, "num_classes", None)
    if num_classes is None and isinstance(pipe, DiTPipeline):
        num_classes = pipe.transformer.config.num_embeds_ada_norm
    if num_classes is None:
        raise ValueError(f"{type(pipe).__name__} does not say how many classes it has; set `num_classes`.")

    def class_of(index: int) -> dict:
        if config.classes == "balanced":
            return {"class_labels": index % num_classes}
        generator = torch.Generator().manual_seed(config.seed + index)
        return {"class_labels": int(torch.randint(num_classes, (), generator=generator))}

    return class_of


@torch.no_grad()
def _draw(
    pipe: DiffusionPipeline, config: SamplingConfig, indices: range, conditions: Callable[[int], dict]
) -> np.ndarray:
    """Images `(n, height, width, 3)`, uint8."""
    said = [conditions(index) for index in indices]
    arguments = {name: [one[name] for one in said] for name in said[0]} | config.arguments
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
