"""PNG files that hold the parameters with which their images were generated."""

import json
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .arguments import is_integer, plain
from .files import replacing


# The text chunk in which image tools store generation parameters.
KEY = "parameters"

# Parameters that are left out of a file where they have these values.
DEFAULTS = {"seed_index": 0, "batch_size": 1, "batch_index": 0, "generator_device": "cpu"}
# Those that the models of one family alone have.
DEFAULTS |= {"prefix_codes": [], "decoding_window": 1}


def write_png(image: Image.Image, file: BinaryIO | Path, parameters: dict) -> None:
    """Write `image` to a file, with `parameters` as JSON in its text chunk "parameters".

    Args:
        image (`PIL.Image.Image`): The image.
        file (binary file or `Path`): An open file, or a path.
        parameters (`dict`): Plain JSON.
    """
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(parameters, ensure_ascii=False))
    image.save(file, format="PNG", pnginfo=info)


def save_png(image: Image.Image, path: str | Path, parameters: dict) -> None:
    """Write `image` to `path`, whole or not at all, with `parameters` as JSON in its text chunk "parameters".

    Args:
        image (`PIL.Image.Image`): The image.
        path (`str` or `os.PathLike`): The file, replaced if it exists.
        parameters (`dict`): Plain JSON.

    Raises:
        ValueError: If the file can't be written.
    """
    try:
        with replacing(path) as partial:
            write_png(image, partial, parameters)
    except OSError as error:
        raise ValueError(f"The image {str(path)!r} can't be written: {error.strerror or error}.") from error


def read_parameters(path: str | Path) -> dict:
    """Read the parameters that [`save_png`] stored.

    Args:
        path (`str` or `os.PathLike`): The file.

    Raises:
        ValueError: If it is not an image, or holds no parameters of this package.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except Exception as error:  # Pillow's readers have no error in common
        raise ValueError(f"The image {str(path)!r} can't be read: {error}.") from error
    try:
        parameters = json.loads(text or "")
    except ValueError:  # other programs store plain text in the same chunk
        parameters = None
    if not isinstance(parameters, dict):
        raise ValueError(f"The image {str(path)!r} holds no parameters of llamagen.")
    return parameters


def in_common(parameters: list[dict]) -> dict:
    """The parameters of several images in one grid: what they have in common, and their `seeds`.

    Of images that were enlarged, the same of their upsamplers.
    """
    if len(parameters) == 1:
        return parameters[0]
    common = {
        name: value for name, value in parameters[0].items() if all(other.get(name) == value for other in parameters)
    }
    if all("upsampler" in each for each in parameters):
        common["upsampler"] = in_common([each["upsampler"] for each in parameters])
    return common | {"seeds": [each["seed"] for each in parameters]}


def fresh_seed(generator: torch.Generator) -> int | None:
    """The seed of a generator that nothing was drawn from yet, else `None`."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    return seed if torch.equal(generator.get_state(), fresh.get_state()) else None


def describe(
    conditions: list[dict],
    settings: dict,
    generators: list[torch.Generator],
    facts: dict,
    own: list[dict] | None = None,
) -> list[dict]:
    """The parameters of each image of a call.

    Args:
        conditions (`list[dict]`): For each image its condition, such as `{"prompt": "a cat"}`, or nothing.
        settings (`dict`): Sampling settings, none of them `None`.
        generators (`list[torch.Generator]`): The generator that each image draws from. One that stands here several
            times serves these images one after the other.
        facts (`dict`): What is the same for all: checkpoint, device, dtype, versions.
        own (`list[dict]`, *optional*): More of each image.

    Returns:
        `list[dict]`: The condition and the settings; `seed`, `None` if the generator was used before; `seed_index`,
        how many images of this call its generator drew before; `generator_device`; `batch_size` and `batch_index`,
        since the last bits of an image may depend on them; and the facts.
    """
    seeds = {id(generator): fresh_seed(generator) for generator in generators}
    uses: dict[int, int] = {}
    described = []
    for index, generator in enumerate(generators):
        optional = {
            "seed_index": uses.get(id(generator), 0),
            "batch_size": len(generators),
            "batch_index": index,
            "generator_device": generator.device.type,
        } | (own[index] if own else {})
        uses[id(generator)] = optional["seed_index"] + 1
        parameters = conditions[index] | settings | {"seed": seeds[id(generator)]}
        parameters |= {name: value for name, value in optional.items() if value != DEFAULTS.get(name)}
        described.append(parameters | facts)
    return described


def complete(parameters: dict, settings: list[str]) -> dict:
    """The parameters of an image with those that were left out, checked: they suffice to draw it again.

    Args:
        parameters (`dict`): As [`describe`] gives them.
        settings (`list[str]`): Names of the settings that an image needs.

    Raises:
        ValueError: If they do not determine an image.
    """
    if parameters.get("seed") is None:
        raise ValueError(
            "These parameters hold no seed, so the image can't be drawn again; draw with a generator that is new."
        )
    if missing := [name for name in settings if name not in parameters]:
        raise ValueError(f"These parameters lack {', '.join(missing)}, so the image can't be drawn again.")
    if "interrupted_after" in parameters:
        raise ValueError("The image was interrupted; these parameters would draw the whole of it.")
    full = {name: plain(value) for name, value in (DEFAULTS | parameters).items()}
    for name, limit in (("seed", 2**64), ("seed_index", 2**16), ("batch_size", 2**12), ("batch_index", None)):
        limit = full["batch_size"] if limit is None else limit
        if not is_integer(full[name]) or not 0 <= full[name] < limit:
            raise ValueError(f"These parameters are damaged: {name} is {full[name]!r}.")
    return full


def seeded(parameters: dict) -> torch.Generator:
    """A new generator with the seed of an image, from [`complete`] parameters.

    Raises:
        ValueError: If its device is not available.
    """
    device = parameters["generator_device"]
    try:
        return torch.Generator(device).manual_seed(parameters["seed"])
    except RuntimeError as error:
        raise ValueError(f"The device {device!r} of the seed is not available here.") from error
