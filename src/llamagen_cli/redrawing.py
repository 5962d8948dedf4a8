"""An image again from the parameters in its PNG, as `llamagen generate --from` does."""

from pathlib import Path

import typer

from .app import load_pipeline


def check_redrawing(context: typer.Context) -> None:
    """Raise a `ValueError` if the command line has options that `--from` takes from its image."""
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    if extra := sorted(given - {"redraw", "checkpoint", "upsampler", "output", "device"}):
        raise ValueError(f"`--from` takes {', '.join(extra)} from the image; leave it out.")


def generate_again(path: Path, checkpoint: str | None, upsampler: str | None, device: str | None):
    """What the pipeline returns for the image of a PNG, generated again by its parameters.

    Args:
        path (`Path`): The PNG.
        checkpoint, upsampler (`str`, *optional*): Folders or Hub ids, in place of those that the parameters name.
        device (`str`, *optional*): In place of the one that they name.

    Raises:
        ValueError: If they do not determine an image, or do not fit the checkpoints.
    """
    from llamagen_hf import CascadePipeline
    from llamagen_hf.provenance import read_parameters

    parameters = read_parameters(path)
    first, *others = described_parts(parameters)
    pipe = load_described(first, checkpoint, device, path, "--checkpoint")
    for part in others[len(parts_of(pipe)) - 1 :]:
        given = upsampler if part is others[-1] else None
        pipe = CascadePipeline(pipe, load_described(part, given, device, path, "--upsampler"))
    parts = parts_of(pipe)
    if len(parts) != len(others) + 1:
        raise ValueError(f"The image {str(path)!r} was not drawn by this cascade: it has {len(parts)} parts.")
    for part, described in zip(parts, [first, *others], strict=True):
        if "lora" in described:
            part.load_loras(described["lora"])
    if first.get("compiled"):
        parts[0].compile_step()
    return pipe.redraw(parameters)


def described_parts(parameters: dict) -> list[dict]:
    """The parameters of each part of a cascade, from the base on; those of the one pipeline if there is no cascade.

    Raises:
        ValueError: If they are damaged.
    """
    own, upsampler = {name: value for name, value in parameters.items() if name != "upsampler"}, []
    if "upsampler" in parameters:
        if not isinstance(parameters["upsampler"], dict):
            raise ValueError(f"These parameters are damaged: upsampler is {parameters['upsampler']!r}.")
        upsampler = described_parts(parameters["upsampler"])
    return [own, *upsampler]


def load_described(parameters: dict, checkpoint: str | None, device: str | None, path: Path, option: str):
    """Load the checkpoint that parameters name, or another one.

    Raises:
        ValueError: If there is none.
    """
    loaded = {name: parameters[name] for name in ("revision", "variant") if name in parameters}
    if checkpoint is None:
        checkpoint = parameters.get("checkpoint")
        if checkpoint is None:
            what = "its upsampler" if option == "--upsampler" else "its checkpoint"
            raise ValueError(f"The image {str(path)!r} does not name {what}; pass {option}.")
    else:
        loaded.pop("revision", None)
    return load_pipeline(
        checkpoint,
        device or parameters.get("device"),
        parameters.get("dtype"),
        quantization_to_apply(parameters, checkpoint, loaded),
        **loaded,
    )


def quantization_to_apply(parameters: dict, checkpoint: str, loaded: dict) -> dict[str, str]:
    """The mode of each component that an image was drawn with, less those that the checkpoint was saved with.

    Raises:
        ValueError: If the parameters are damaged.
    """
    from llamagen_hf.loading.checkpoint import CheckpointLoaderMixin
    from llamagen_hf.loading.quantization import saved_quantizations

    modes = parameters.get("quantization", {})
    if not isinstance(modes, dict) or not all(isinstance(mode, str) for mode in modes.values()):
        raise ValueError(f"These parameters are damaged: quantization is {modes!r}.")
    if not modes:
        return {}
    saved = saved_quantizations(CheckpointLoaderMixin.find_checkpoint(checkpoint, **loaded))
    return {name: mode for name, mode in modes.items() if name not in saved}


def parts_of(pipe) -> list:
    """The base of a cascade and its upsamplers, in the order of their work; a pipeline of one part by itself."""
    from llamagen_hf import CascadePipeline

    return [*parts_of(pipe.base), pipe.upsampler] if isinstance(pipe, CascadePipeline) else [pipe]
