"""`llamagen generate`."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Checkpoint, Device, Dtype, app, check_writable, load_pipeline, one_sentence_errors


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="Prompt, for text-conditional checkpoints.")] = None,
    class_label: Annotated[
        str | None,
        typer.Option(help="Class by name or, if there is no such name, by id, for class-conditional checkpoints."),
    ] = None,
    checkpoint: Checkpoint = None,
    output: Annotated[
        Path | None, typer.Option(help="PNG to write. Default: a new one, named after the prompt.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first image; each further one adds 1.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Number of images; several are numbered.")] = 1,
    grid: Annotated[Path | None, typer.Option(help="Also write all images side by side to this PNG.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Strength of guidance; 1 for none. Default: the checkpoint's.")
    ] = None,
    guidance_interval: Annotated[int, typer.Option(help="Guide the first n + 2 codes only; -1 for all.")] = -1,
    temperature: Annotated[
        float | None, typer.Option(help="0 for the likeliest codes. Default: the checkpoint's.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Number of codes to sample from; 0 for all. Default: the checkpoint's."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Probability mass to sample from; 1 for all. Default: the checkpoint's."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image to complete.")] = None,
    keep_rows: Annotated[
        int | None, typer.Option(help="Rows of codes to keep of --image. Default: the upper half.")
    ] = None,
    num_candidates: Annotated[int, typer.Option(min=1, help="Generate so many for each image, keep the best.")] = 1,
    scorer: Annotated[
        str, typer.Option(help="CLIP model that chooses among candidates: a folder or Hub id.")
    ] = "openai/clip-vit-base-patch32",
    redraw: Annotated[
        Path | None, typer.Option("--from", help="Generate this image again, by the parameters in its metadata.")
    ] = None,
    device: Device = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: float32.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the generation of a code; worth it for many images.")
    ] = False,
):
    """Generate one or more images and save them as PNG, with their parameters in the metadata."""
    with one_sentence_errors():
        subject = prompt if prompt is not None else class_label
        if redraw is not None:
            check_redrawing(context)
            subject = f"{redraw.stem}-again"
        elif subject is None or (prompt is not None and class_label is not None):
            raise ValueError("Pass either a prompt or `--class-label`.")
        planned = output or name_output(subject, count)
        for path in filter(None, (planned, grid)):  # checked before the work, not after it
            if path.suffix.lower() != ".png":
                raise ValueError(f"The output {str(path)!r} must end in .png.")
            check_writable(path)
        names = [planned.stem] if count == 1 else [f"{planned.stem}-{i}" for i in range(count)]
        if grid is not None and grid.absolute() in [planned.absolute().with_stem(name) for name in names]:
            raise ValueError(f"The grid {str(grid)!r} would replace an image; give it another name.")
        if redraw is not None:
            result = generate_again(redraw, checkpoint, device)
        else:
            import torch

            from llamagen_hf.images.reading import read_image

            source = None if image is None else read_image(image)
            if source is None and keep_rows is not None:
                raise ValueError("`--keep-rows` says how much of `--image` to keep, which is missing.")
            pipe = load_pipeline(checkpoint, device, dtype)
            if compile:
                pipe.compile_step()
            inputs = {"class_labels": class_label} if prompt is None else {"prompt": prompt}
            if source is not None:
                rows = pipe.transformer.config.grid_size // 2 if keep_rows is None else keep_rows
                inputs |= {"image": source, "keep_rows": rows}
            if num_candidates > 1:
                from llamagen_hf.clip import CLIPScorer

                inputs |= {"num_candidates": num_candidates, "scorer": CLIPScorer.from_pretrained(scorer)}
            result = pipe(
                **inputs,
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                num_images_per_prompt=count,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
            )
        # The name is found again, since another command may have taken it meanwhile.
        for path in result.save(output or name_output(subject, count)):
            typer.echo(f"Saved {path}")
        if grid is not None:
            from llamagen_hf.images.grid import image_grid
            from llamagen_hf.provenance import in_common, save_png

            save_png(image_grid(result.images), grid, in_common(result.parameters))
            typer.echo(f"Saved {grid}")


def name_output(subject: str, count: int) -> Path:
    """A new file that is named after a prompt or a class."""
    from llamagen_hf.files import file_stem, free_path

    return free_path(file_stem(subject), ".png", [""] if count == 1 else [f"-{i}" for i in range(count)])


def check_redrawing(context: typer.Context) -> None:
    """Raise a `ValueError` if the command line has options that `--from` takes from its image."""
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    if extra := sorted(given - {"redraw", "checkpoint", "output", "device"}):
        raise ValueError(f"`--from` takes {', '.join(extra)} from the image; leave it out.")


def generate_again(path: Path, checkpoint: str | None, device: str | None):
    """What the pipeline returns for the image of a PNG, generated again by its parameters."""
    from llamagen_hf.provenance import read_parameters

    parameters = read_parameters(path)
    loaded = {name: parameters[name] for name in ("revision", "variant") if name in parameters}
    if checkpoint is None:
        checkpoint = parameters.get("checkpoint")
        if checkpoint is None:
            raise ValueError(f"The image {str(path)!r} does not name its checkpoint; pass --checkpoint.")
    else:
        loaded.pop("revision", None)
    pipe = load_pipeline(checkpoint, device or parameters.get("device"), parameters.get("dtype"), **loaded)
    pipe.load_loras(parameters.get("lora", []))
    if parameters.get("compiled"):
        pipe.compile_step()
    return pipe.redraw(parameters)
