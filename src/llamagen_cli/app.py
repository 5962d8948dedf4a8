"""The application that the commands belong to, and what they have in common."""

import io
import logging
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer


class Application(typer.Typer):
    """The command line on a console of any encoding: characters that it can't show are escaped, not an error."""

    def __call__(self, *args, **kwargs):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().__call__(*args, **kwargs)


app = Application(
    help="Generate images with LlamaGen, an autoregressive image generator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Checkpoint = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id. Default: emoji, which ships with llamagen (a folder: ./emoji)."),
]
Upsampler = Annotated[
    str | None,
    typer.Option(
        help="Upsampler that enlarges the images: a folder or Hub id, or none. Default: for emoji the one that ships "
        "with llamagen, if any."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: an accelerator, if any.")]
Dtype = Literal["float32", "float16", "bfloat16"]
DtypeOrAuto = Literal[Dtype, "auto"]  # auto: bfloat16 where the device has instructions for it, else float32
Quantization = Annotated[
    Literal["int8", "int8-dynamic", "float8"] | None,
    typer.Option(help="Bits of the weights of a generator of codes: less memory. Needs `llamagen-hf[quantization]`."),
]


# Where torchao is installed, importing diffusers reports kernels of other devices that can't be loaded.
for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
    logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def one_sentence_errors():
    """Print a `ValueError` or `OSError` without a traceback, and exit with 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error


def check_writable(path: Path) -> None:
    """Raise a `ValueError` if no file can be made at `path`."""
    if path.is_dir():
        raise ValueError(f"The output {str(path)!r} can't be written: it is a folder.")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"The output {str(path)!r} can't be written: {error.strerror or error}.") from error


def find_device(device: str | None = None) -> str:
    """`device`, by default an accelerator if there is one; a `ValueError` if this machine does not have it."""
    import torch

    if device is None:
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        if torch.zeros(1, device=device).is_meta:
            raise RuntimeError("a meta device holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {device!r} here; try cpu.") from error
    return device


def quiet_loading() -> None:
    """Turn off the progress bars and warnings of diffusers and transformers while they load models."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def load_pipeline(
    checkpoint: str | None,
    device: str | None = None,
    dtype: DtypeOrAuto | None = None,
    quantization: dict[str, str] | None = None,
    **kwargs,
):
    """Load a checkpoint that draws images, by default in float32; a `ValueError` for an unknown device or dtype.

    `quantization` is the mode of each component that is to be quantized.
    """
    from llamagen_hf import families
    from llamagen_hf.loading.precision import resolve_dtype

    quiet_loading()
    if dtype not in (None, *get_args(DtypeOrAuto)):  # from the parameters of an image
        raise ValueError(f"The dtype is {dtype!r}; expected float32, float16 or bfloat16.")
    device = find_device(device)
    dtype = resolve_dtype(dtype or "float32", device)
    if quantization:
        from llamagen_hf.loading.quantization import quantize_components

        kwargs["quantization_config"] = quantize_components(quantization)
    return families.load_pipeline(checkpoint, draws="images", dtype=dtype, **kwargs).to(device)
