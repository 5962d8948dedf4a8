"""`llamagen upscale`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Device, DtypeOrAuto, app, check_writable, load_pipeline, one_sentence_errors
from .generate import DEFAULT_SCORER, AugLevel, Scorer


@app.command()
def upscale(
    image: Annotated[Path, typer.Argument(help="Image to enlarge: square, smaller than what the upsampler makes.")],
    upsampler: Annotated[str, typer.Option(help="Upsampler: a folder or Hub id.")],
    prompt: Annotated[str | None, typer.Option(help="What it shows, for an upsampler that reads text.")] = None,
    aug_level: AugLevel = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Strength of guidance; 1 for none. Default: the upsampler's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to image. Default: the upsampler's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the noise.")] = 0,
    scorer: Scorer = DEFAULT_SCORER,
    output: Annotated[Path | None, typer.Option(help="PNG to write. Default: a new one.")] = None,
    device: Device = None,
    dtype: Annotated[DtypeOrAuto | None, typer.Option(help="auto: the fastest here. Default: float32.")] = None,
):
    """Enlarge an image, and save it as PNG with its parameters in the metadata."""
    with one_sentence_errors():
        import torch

        from llamagen_hf.files import free_path
        from llamagen_hf.images.reading import read_image

        if output is not None and output.suffix.lower() != ".png":
            raise ValueError(f"The output {str(output)!r} must end in .png.")
        check_writable(output or Path(f"{image.stem}-large.png"))
        small = read_image(image)
        pipe = load_pipeline(upsampler, device, dtype)
        if not getattr(pipe, "upsamples", False):
            raise ValueError(f"{upsampler!r} enlarges no images; expected the checkpoint of an upsampler.")
        settings = {"aug_level": aug_level}
        if aug_level and len(aug_level) == 1:
            settings = {"aug_level": aug_level[0]}
        elif aug_level:
            from llamagen_hf.clip import CLIPScorer

            settings["scorer"] = CLIPScorer.from_pretrained(scorer)
        result = pipe(
            prompt,
            small,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        )
        for path in result.save(output or free_path(f"{image.stem}-large", ".png", [""])):
            typer.echo(f"Saved {path}")
