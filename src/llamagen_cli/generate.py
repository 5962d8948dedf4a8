"""`llamagen generate`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from .app import Checkpoint, app, check_writable, load_pipeline, one_sentence_errors


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to draw, for text-conditional checkpoints.")] = None,
    class_label: Annotated[
        str | None,
        typer.Option(help="Class by name or, if none is called so, by id, for class-conditional checkpoints."),
    ] = None,
    checkpoint: Checkpoint = None,
    output: Annotated[
        Path | None, typer.Option(help="PNG to write. Default: a new one, named after the prompt.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first image; each further one adds 1.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Number of images; several are numbered.")] = 1,
    grid: Annotated[Path | None, typer.Option(help="Also write all images side by side to this PNG.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Strength of guidance, 1 for none. Default: the checkpoint's.")
    ] = None,
    guidance_interval: Annotated[int, typer.Option(help="Guide the first n + 2 codes only; -1 for all.")] = -1,
    temperature: Annotated[
        float | None, typer.Option(help="0 for the likeliest codes. Default: the checkpoint's.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Codes to draw from, 0 for all. Default: the checkpoint's.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Probability to draw from, 1 for all. Default: the checkpoint's.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image to complete.")] = None,
    keep_rows: Annotated[
        int | None, typer.Option(help="Rows of codes to keep of --image. Default: the upper half.")
    ] = None,
    num_candidates: Annotated[int, typer.Option(min=1, help="Draw so many for each image, keep the best.")] = 1,
    scorer: Annotated[
        str, typer.Option(help="CLIP model that chooses among candidates: a folder or Hub id.")
    ] = "openai/clip-vit-base-patch32",
    redraw: Annotated[
        Path | None, typer.Option("--from", help="Draw this image again, by the parameters in its metadata.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: an accelerator, if any.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: float32.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the drawing; pays off for many images.")] = False,
):
    """Draw one or more images and save them as PNG, with the parameters in their metadata."""
    with one_sentence_errors():
        subject = prompt if prompt is not None else class_label
        if redraw is not None:
            check_redrawing(context)
            subject = f"{redraw.stem}-again"
        elif subject is None or (prompt is not None and class_label is not None):
            raise ValueError("Pass either a prompt or `--class-label`.")
        given = output
        output = given or name_output(subject, count)
        for path in filter(None, (output, grid)):  # before the work, not after it
            if path.suffix.lower() != ".png":
                raise ValueError(f"The output {str(path)!r} must end in .png.")
            check_writable(path)
        if grid is not None and grid.absolute() in planned(output.absolute(), count):
            raise ValueError(f"The grid {str(grid)!r} would replace an image; give it another name.")
        if redraw is not None:
            result = draw_again(redraw, checkpoint, device)
        else:
            import torch

            from llamagen_hf.images.reading import read_image

            picture = None if image is None else read_image(image)
            if picture is None and keep_rows is not None:
                raise ValueError("`--keep-rows` says how much of `--image` to keep, which is missing.")
            pipe = load_pipeline(checkpoint, device, dtype)
            if compile:
                pipe.compile_step()
            if prompt is not None:
                condition = {"prompt": prompt}
            else:
                condition = {"class_labels": class_label}
            if picture is not None:
                rows = pipe.transformer.config.grid_size // 2 if keep_rows is None else keep_rows
                condition |= {"image": picture, "keep_rows": rows}
            if num_candidates > 1:
                from llamagen_hf.clip import CLIPScorer

                condition |= {"num_candidates": num_candidates, "scorer": CLIPScorer.from_pretrained(scorer)}
            result = pipe(
                **condition,
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                num_images_per_prompt=count,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
            )
        # Looked for again, since another command may have taken the name meanwhile.
        for path in result.save(given or name_output(subject, count)):
            typer.echo(f"Saved {path}")
        if grid is not None:
            save_grid(result, grid)
            typer.echo(f"Saved {grid}")


def planned(output: Path, count: int) -> list[Path]:
    """The files of so many images, as `AutoregressiveImageOutput.save` numbers them."""
    return [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(count)]


def name_output(subject: str, count: int) -> Path:
    """A file that is named after a prompt, and where it replaces none."""
    from llamagen_hf.files import file_stem, free_path

    return free_path(file_stem(subject), ".png", [""] if count == 1 else [f"-{i}" for i in range(count)])


def check_redrawing(context: typer.Context) -> None:
    """Raise a `ValueError` if the command line says anything that `--from` takes from its image."""
    free = {"redraw", "checkpoint", "output", "device"}
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    if given - free:
        names = ", ".join(sorted(given - free))
        raise ValueError(f"`--from` takes {names} from the image; leave it out.")


def draw_again(picture: Path, checkpoint: str | None, device: str | None):
    """What the pipeline returns for the image of a PNG, drawn again by its parameters."""
    from llamagen_hf.provenance import read_parameters

    parameters = read_parameters(picture)
    loaded = {name: parameters[name] for name in ("revision", "variant") if name in parameters}
    if checkpoint is None:
        checkpoint = parameters.get("checkpoint")
        if checkpoint is None:
            raise ValueError(f"The image {str(picture)!r} does not say which checkpoint drew it; pass --checkpoint.")
    else:
        loaded.pop("revision", None)
    pipe = load_pipeline(checkpoint, device or parameters.get("device"), parameters.get("dtype"), **loaded)
    pipe.load_loras(parameters.get("lora", []))
    if parameters.get("compiled"):
        pipe.compile_step()
    return pipe.redraw(parameters)


def save_grid(result, path: Path) -> None:
    """Write all images of a drawing side by side, with what they have in common as parameters."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    from llamagen_hf.provenance import save_png

    images, every = result.images, result.parameters
    columns = math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    blanks = [Image.new("RGB", images[0].size, "white")] * (rows * columns - len(images))
    common = {name: value for name, value in every[0].items() if all(other.get(name) == value for other in every)}
    seeds = {"seeds": [parameters["seed"] for parameters in every]}
    save_png(make_image_grid(images + blanks, rows, columns), path, common | seeds)
