"""`llamagen generate`."""

from inspect import signature
from pathlib import Path
from typing import Annotated

import typer

from .app import (
    Checkpoint,
    Device,
    DtypeOrAuto,
    Quantization,
    Upsampler,
    app,
    check_writable,
    load_pipeline,
    one_sentence_errors,
)
from .redrawing import check_redrawing, generate_again, parts_of


AugLevel = Annotated[
    list[float] | None,
    typer.Option(
        help="Noise that the upsampler adds to the small image, from 0 to 1; of several, --scorer chooses. "
        "Default: the upsampler's."
    ),
]
Scorer = Annotated[str, typer.Option(help="CLIP model that chooses the best image: a folder or Hub id.")]
DEFAULT_SCORER = "openai/clip-vit-base-patch32"


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
    variation_of: Annotated[
        Path | None,
        typer.Option(help="Image to vary, in place of a prompt, for checkpoints with a prior and a decoder."),
    ] = None,
    num_candidates: Annotated[int, typer.Option(min=1, help="Generate so many for each image, keep the best.")] = 1,
    decoding_window: Annotated[
        str | None,
        typer.Option(help="Codes that a step may draw, for the same image in float32: a number, or auto."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps from noise to image of a diffusion model. Default: the checkpoint's.")
    ] = None,
    upsampler: Upsampler = None,
    guide: Annotated[
        str | None, typer.Option(help="Classifier that guides a diffusion model to --guide-label: a folder or Hub id.")
    ] = None,
    guide_label: Annotated[str | None, typer.Option(help="Class of --guide, by name or id.")] = None,
    guide_scale: Annotated[float, typer.Option(help="Strength of --guide; 0 for none.")] = 1.0,
    aug_level: AugLevel = None,
    upsampler_steps: Annotated[int | None, typer.Option(help="The upsampler's steps. Default: its own.")] = None,
    upsampler_guidance_scale: Annotated[
        float | None,
        typer.Option(help="Guidance of an upsampler that reads text; 1 for none. Default: the upsampler's."),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="CLIP model that chooses the best image: a folder or Hub id. Default: LlamaGen's own likelihood "
            f"chooses among candidates, {DEFAULT_SCORER} among the rest."
        ),
    ] = None,
    redraw: Annotated[
        Path | None, typer.Option("--from", help="Generate this image again, by the parameters in its metadata.")
    ] = None,
    device: Device = None,
    dtype: Annotated[DtypeOrAuto | None, typer.Option(help="auto: the fastest here. Default: float32.")] = None,
    quantization: Quantization = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the generator; takes a minute the first time.")
    ] = False,
):
    """Generate one or more images and save them as PNG, with their parameters in the metadata."""
    with one_sentence_errors():
        given = [each for each in (prompt, class_label, variation_of) if each is not None]
        subject = None if not given else f"{variation_of.stem}-variation" if given[0] is variation_of else given[0]
        if redraw is not None:
            check_redrawing(context)
            subject = f"{redraw.stem}-again"
        elif len(given) > 1 or (subject is None and checkpoint is None):
            raise ValueError("Pass either a prompt or `--class-label`. `--variation-of` takes the place of both.")
        subject = "image" if subject is None else subject
        planned = output or name_output(subject, count)
        for path in filter(None, (planned, grid)):  # checked before the work, not after it
            if path.suffix.lower() != ".png":
                raise ValueError(f"The output {str(path)!r} must end in .png.")
            check_writable(path)
        names = [planned.stem] if count == 1 else [f"{planned.stem}-{i}" for i in range(count)]
        if grid is not None and grid.absolute() in [planned.absolute().with_stem(name) for name in names]:
            raise ValueError(f"The grid {str(grid)!r} would replace an image; give it another name.")
        if redraw is not None:
            if upsampler == "none":
                raise ValueError("`--from` generates the image as it was; leave `--upsampler none` out.")
            result = generate_again(redraw, checkpoint, upsampler, device)
        else:
            import torch

            from llamagen_hf.families import ranks_candidates
            from llamagen_hf.images.reading import read_image
            from llamagen_hf.loading.checkpoint import find_upsampler

            source = None if image is None else read_image(image)
            varied = None if variation_of is None else read_image(variation_of)
            if source is None and keep_rows is not None:
                raise ValueError("`--keep-rows` says how much of `--image` to keep, which is missing.")
            if (guide is None) != (guide_label is None) or (guide is None and guide_scale != 1):
                raise ValueError("`--guide` and `--guide-label` go together, `--guide-scale` goes with them.")
            quantized = None if quantization is None else {"transformer": quantization}
            pipe = load_pipeline(checkpoint, device, dtype, quantized)
            if (upsampler := find_upsampler(checkpoint, upsampler)) is not None:
                from llamagen_hf import CascadePipeline

                pipe = CascadePipeline(pipe, load_pipeline(upsampler, device, dtype))
            inputs = {"prompt": prompt, "class_labels": class_label, "guidance_scale": guidance_scale}
            inputs |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "num_inference_steps": steps}
            inputs |= {"guidance_interval": None if guidance_interval == -1 else guidance_interval, "image": source}
            inputs |= {"upsampler_num_inference_steps": upsampler_steps}
            inputs |= {"upsampler_guidance_scale": upsampler_guidance_scale}
            inputs["guide"] = guide
            inputs["decoding_window"] = decoding_window
            if decoding_window is not None and decoding_window.isdecimal():
                inputs["decoding_window"] = int(decoding_window)
            inputs["aug_level"] = aug_level[0] if aug_level and len(aug_level) == 1 else aug_level or None
            inputs = {name: value for name, value in inputs.items() if value is not None}
            if varied is not None:
                inputs["image_embeds"] = embed_varied(pipe, varied)
            check_inputs(pipe, inputs, compile, quantization)
            if compile:
                parts_of(pipe)[0].compile_step()
            if source is not None:
                inputs["keep_rows"] = pipe.grid_size // 2 if keep_rows is None else keep_rows
            if guide is not None:
                from llamagen_hf.diffusion.guides import ClassifierGuide

                inputs["guide"] = ClassifierGuide.from_pretrained(guide, guide_label, guide_scale).to(pipe.device)
            is_sweep = aug_level is not None and len(aug_level) > 1
            if num_candidates > 1 or is_sweep:
                inputs["num_candidates"] = num_candidates
                if scorer is not None or is_sweep or not ranks_candidates(pipe):
                    from llamagen_hf.clip import CLIPScorer

                    inputs["scorer"] = CLIPScorer.from_pretrained(scorer or DEFAULT_SCORER)
            result = pipe(
                **inputs,
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


# Options that are not named after the argument of the pipelines.
OPTIONS = {
    "prompt": "prompt",
    "class_labels": "`--class-label`",
    "num_inference_steps": "`--steps`",
    "upsampler_num_inference_steps": "`--upsampler-steps`",
}


def embed_varied(pipe, image):
    """The embedding of an image to vary; a `ValueError` if the checkpoint draws from none."""
    base = parts_of(pipe)[0]
    if "image_embeds" not in signature(type(base).__call__).parameters:
        raise ValueError("`--variation-of` is for checkpoints with a prior and a decoder.")
    return base.encode_image(image)


def check_inputs(pipe, inputs: dict, compile: bool, quantization: str | None = None) -> None:
    """Raise a `ValueError` if a checkpoint can't do what the command line asks for."""
    base, *upsamplers = parts_of(pipe)
    known = dict(signature(type(base).__call__).parameters)
    if "image_embeds" in known:  # what it takes besides is for its decoder
        known |= signature(type(base.decoder).__call__).parameters
        known = {name: value for name, value in known.items() if name not in ("class_labels", "image")}
    for name in inputs:
        option = OPTIONS.get(name, f"`--{name.replace('_', '-')}`")
        if name == "aug_level" or name.startswith("upsampler_"):
            if not upsamplers:
                raise ValueError(f"{option} is for upsamplers: pass `--upsampler`, or the checkpoint of a cascade.")
        elif name not in known or (name == "image" and "keep_rows" not in known):
            raise ValueError(f"This checkpoint takes no {option}.")
    if not inputs.keys() & {"prompt", "class_labels", "image_embeds"} and pipe.condition_kind != "none":
        raise ValueError("Pass either a prompt or `--class-label`.")
    for option, given in (("compile", compile), ("quantization", quantization)):
        if given and not hasattr(base, "compile_step"):
            raise ValueError(f"`--{option}` is for models that generate codes.")
