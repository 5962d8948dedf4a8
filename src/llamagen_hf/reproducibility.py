"""What makes an image depend on its own seed alone: a generator for each image, and one precision for all calls."""

from collections.abc import Callable
from functools import wraps

import torch

from .arguments import FieldError


def in_own_precision(method: Callable) -> Callable:
    """Decorate a pipeline's method to compute in the precision of the weights, also under [`torch.autocast`].

    The image of a seed, and the parameters that describe it, must not depend on the context of the call.
    """

    @wraps(method)
    def wrapper(self, *args, **kwargs):
        with torch.autocast(self._execution_device.type, enabled=False):
            return method(self, *args, **kwargs)

    return wrapper


def check_generator(generator, num_images: int) -> None:
    """Check the `generator` of a call that draws `num_images` images.

    Raises:
        FieldError: If it is not a generator or a list of one for each image.
    """
    if not isinstance(generator, (torch.Generator, list, type(None))):
        raise FieldError("generator", f"`generator` must be a torch.Generator or a list of them, not {generator!r}.")
    if isinstance(generator, list) and len(generator) != num_images:
        raise FieldError(
            "generator",
            f"`generator` is a list of {len(generator)}, but {num_images} images are to be drawn.",
        )


def image_generators(
    generator: torch.Generator | list[torch.Generator] | None, num_images: int, num_candidates: int = 1
) -> list[torch.Generator]:
    """The generator of each image that is drawn, the candidates of an image one after the other.

    Args:
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            One for all images, or for each. By default each image gets one with a seed of its own.
        num_images (`int`): Images to return.
        num_candidates (`int`, *optional*, defaults to 1): Images to draw for each of them.
    """
    if generator is None:
        # Seeds rather than numbers from torch's own state: with them an image can be drawn again.
        seeds = torch.randint(2**62, (num_images,), device="cpu").tolist()
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    elif isinstance(generator, torch.Generator):
        generator = [generator] * num_images
    return [each for each in generator for _ in range(num_candidates)]


def clone(generator: torch.Generator) -> torch.Generator:
    """Another generator that yields the same numbers."""
    other = torch.Generator(generator.device)
    other.set_state(generator.get_state())
    return other


def told_apart(generators: list[torch.Generator]) -> list[torch.Generator]:
    """A generator of its own for each image, for work in which all images draw in turn.

    Where a generator stands for the first time it is used itself, so that the image is the one that it would draw
    alone. The images after that get new ones, whose seeds follow from its state.
    """
    seeds: dict[int, torch.Generator] = {}
    own = []
    for generator in generators:
        if id(generator) not in seeds:
            seeds[id(generator)] = clone(generator)
            own.append(generator)
        else:
            source = seeds[id(generator)]
            seed = int(torch.randint(2**62, (), generator=source, device=source.device))
            own.append(torch.Generator(generator.device).manual_seed(seed))
    return own


def next_generators(generators: list[torch.Generator]) -> list[torch.Generator]:
    """New generators for the next stage of each image, with seeds that the present ones give as they now are.

    Such a seed can be recorded, so that the stage can be repeated by itself.
    """
    seeds = [int(torch.randint(2**62, (), generator=each, device=each.device)) for each in generators]
    return [torch.Generator(each.device).manual_seed(seed) for each, seed in zip(generators, seeds, strict=True)]
