"""The command line, `llamagen`.

It stands beside the package, not within it: importing anything of `llamagen_hf` brings torch and diffusers, and
`--help` should not wait for them.
"""

import json
import math
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    help="Draw images with LlamaGen, an autoregressive image generator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Checkpoint = Annotated[
    str | None, typer.Option(help="Folder or Hub id. Default: the emoji checkpoint that ships with llamagen.")
]


@contextmanager
def one_sentence_errors():
    """Print what is wrong and exit with 1, without a traceback."""
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


def load_pipeline(checkpoint: str | None, device: str | None = None, dtype: str | None = None, **kwargs):
    import diffusers
    import torch
    import transformers

    from llamagen_hf import AutoregressiveImagePipeline

    for library in (diffusers, transformers):  # loading is quick, and the bar of the drawing is the one of interest
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"`--dtype` is {dtype!r}; expected float32, float16 or bfloat16.")
    if device is None:
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        if torch.zeros(1, device=device).is_meta:
            raise RuntimeError("a meta device holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {device!r} here; try cpu.") from error
    pipe = AutoregressiveImagePipeline.from_pretrained(checkpoint, dtype=getattr(torch, dtype or "float32"), **kwargs)
    return pipe.to(device)


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to draw, for text-conditional checkpoints.")] = None,
    class_label: Annotated[
        str | None, typer.Option(help="Class id or name, for class-conditional checkpoints.")
    ] = None,
    checkpoint: Checkpoint = None,
    output: Annotated[Path | None, typer.Option(help="PNG to write. Default: named after the prompt.")] = None,
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
    image: Annotated[Path | None, typer.Option(help="Picture to complete.")] = None,
    keep_rows: Annotated[
        int | None, typer.Option(help="Rows of codes to keep of --image. Default: the upper half.")
    ] = None,
    num_candidates: Annotated[int, typer.Option(min=1, help="Draw so many for each image, keep the best.")] = 1,
    scorer: Annotated[
        str, typer.Option(help="CLIP model that chooses among candidates: a folder or Hub id.")
    ] = "openai/clip-vit-base-patch32",
    redraw: Annotated[
        Path | None, typer.Option("--from", help="Draw this picture again, by the parameters in its metadata.")
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
        if output is None:
            output = Path((re.sub(r"\W+", "-", subject).strip("-").lower()[:60] or "image") + ".png")
        for path in filter(None, (output, grid)):  # before the work, not after it
            if path.suffix.lower() != ".png":
                raise ValueError(f"The output {str(path)!r} must end in .png.")
            check_writable(path)
        if redraw is not None:
            result = draw_again(redraw, checkpoint, device)
        else:
            import torch

            from llamagen_hf.picture_input import open_picture

            picture = None if image is None else open_picture(image)
            if picture is None and keep_rows is not None:
                raise ValueError("`--keep-rows` says how much of `--image` to keep, which is missing.")
            pipe = load_pipeline(checkpoint, device, dtype)
            if compile:
                pipe.compile_step()
            if prompt is not None:
                condition = {"prompt": prompt}
            else:
                is_id = re.fullmatch(r"-?[0-9]+", class_label)
                condition = {"class_labels": int(class_label) if is_id else class_label}
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
        for path in result.save(output):
            typer.echo(f"Saved {path}")
        if grid is not None:
            save_grid(result, grid)
            typer.echo(f"Saved {grid}")


def check_redrawing(context: typer.Context) -> None:
    """Raise a `ValueError` if the command line says anything that `--from` takes from its picture."""
    free = {"redraw", "checkpoint", "output", "device"}
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    if given - free:
        names = ", ".join(sorted(given - free))
        raise ValueError(f"`--from` takes {names} from the picture; leave it out.")


def draw_again(picture: Path, checkpoint: str | None, device: str | None):
    """What the pipeline returns for the picture of a PNG, drawn again by its parameters."""
    from llamagen_hf.png import read_parameters

    parameters = read_parameters(picture)
    loaded = {name: parameters[name] for name in ("revision", "variant") if name in parameters}
    if checkpoint is None:
        checkpoint = parameters.get("checkpoint")
        if checkpoint is None:
            raise ValueError(f"The picture {str(picture)!r} does not say which checkpoint drew it; pass --checkpoint.")
    else:
        loaded.pop("revision", None)
    pipe = load_pipeline(checkpoint, device or parameters.get("device"), parameters.get("dtype"), **loaded)
    for path in parameters.get("lora", []):
        pipe.load_lora_weights(path)
    if parameters.get("compiled"):
        pipe.compile_step()
    return pipe.redraw(parameters)


def save_grid(result, path: Path) -> None:
    """Write all pictures of a drawing side by side, with what they have in common as parameters."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    from llamagen_hf.png import save_png

    images, every = result.images, result.parameters
    columns = math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    blanks = [Image.new("RGB", images[0].size, "white")] * (rows * columns - len(images))
    common = {name: value for name, value in every[0].items() if all(other.get(name) == value for other in every)}
    seeds = {"seeds": [parameters["seed"] for parameters in every]}
    save_png(make_image_grid(images + blanks, rows, columns), path, common | seeds)


@app.command()
def convert(
    vq_checkpoint: Annotated[Path, typer.Option(help="Released tokenizer, such as vq_ds16_c2i.pt.")],
    transformer_checkpoint: Annotated[Path, typer.Option(help="Released generator, such as c2i_B_256.pt.")],
    variant: Annotated[str, typer.Option(help="Its size: B, L, XL, XXL, XXXL, 1B, 3B or 7B.")],
    image_size: Annotated[int, typer.Option(help="Side of its images in pixels: 256, 384 or 512.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new.")],
    text: Annotated[bool, typer.Option("--text", help="The generator is text-conditional.")] = False,
    text_encoder: Annotated[
        str | None, typer.Option(help="Text encoder to include: a folder or Hub id, such as google/flan-t5-xl.")
    ] = None,
    id2label: Annotated[
        Path | None, typer.Option(help="JSON file of class names by id. Default: ImageNet's, fetched from the Hub.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: as released.")] = None,
):
    """Turn released LlamaGen files into a pipeline folder."""
    with one_sentence_errors():
        import torch

        from llamagen_hf.conversion import convert_checkpoint

        if dtype not in (None, "float32", "float16", "bfloat16"):
            raise ValueError(f"`--dtype` is {dtype!r}; expected float32, float16 or bfloat16.")
        names = None
        if id2label is not None:
            try:
                names = {int(key): str(value) for key, value in json.loads(id2label.read_text()).items()}
            except (ValueError, AttributeError, OSError) as error:
                raise ValueError(f"{str(id2label)!r} is no JSON object of class names by id.") from error
        convert_checkpoint(
            vq_checkpoint=vq_checkpoint,
            transformer_checkpoint=transformer_checkpoint,
            variant=variant,
            image_size=image_size,
            output=output,
            text=text,
            text_encoder=text_encoder,
            id2label=names,
            dtype=getattr(torch, dtype) if dtype else None,
        )
        typer.echo(f"Saved {output}")
        if text and text_encoder is None:
            typer.echo("Without --text-encoder it draws from prompt_embeds only, not from prompts.", err=True)


@app.command()
def info(checkpoint: Checkpoint = None):
    """Say what a checkpoint is: sizes, parameters, conditioning, classes."""
    with one_sentence_errors():
        from math import prod

        from safetensors import safe_open

        from llamagen_hf import AutoregressiveImagePipeline, LlamaGenConfig, LlamaGenVQModel

        folder = AutoregressiveImagePipeline.find_checkpoint(checkpoint)
        config = LlamaGenConfig.from_pretrained(folder / "transformer")
        vq = LlamaGenVQModel.load_config(folder / "vq_model")
        defaults = AutoregressiveImagePipeline.load_config(folder).get("sampling_defaults") or {}
        parameters: dict[str, int] = {}
        for path in sorted(folder.glob("*/*.safetensors")):
            with safe_open(path, framework="pt") as file:
                count = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
            parameters[path.parent.name] = parameters.get(path.parent.name, 0) + count
        side = config.grid_size * 2 ** (len(vq["block_out_channels"]) - 1)
        facts = {
            "checkpoint": checkpoint or "emoji, shipped with llamagen",
            "image": f"{side}x{side} pixels from {config.grid_size}x{config.grid_size} codes",
            "codes": f"{vq['num_vq_embeddings']} of width {vq['vq_embed_dim']}",
            "generator": f"{config.num_hidden_layers} layers, {config.hidden_size} wide, "
            f"{config.num_attention_heads} heads",
            "conditioning": f"text, {config.condition_length} positions of width {config.condition_dim}"
            if config.conditioning == "text"
            else f"class, {config.num_classes} classes",
        }
        if config.id2label:
            shown = [f"{index} {name}" for index, name in list(config.id2label.items())[:5]]
            facts["classes"] = ", ".join(shown) + (", ..." if len(config.id2label) > 5 else "")
        facts["parameters"] = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in parameters.items())
        facts["sampling"] = ", ".join(f"{name} {value}" for name, value in defaults.items()) or "as the library's"
        for name, value in facts.items():
            typer.echo(f"{name + ':':14}{value}")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Pipeline, LoRA adapter or codes, as a training wrote them.")],
    repo_id: Annotated[str, typer.Argument(help="Where on the Hub: user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    space: Annotated[bool, typer.Option("--space", help="Also make a Space that shows the pipeline.")] = False,
    license: Annotated[str | None, typer.Option(help="The Hub's name of the licence, such as cc-by-4.0.")] = None,
    draw: Annotated[
        bool, typer.Option("--draw/--no-draw", help="Draw a sample sheet for the card if the folder has none.")
    ] = True,
):
    """Publish on the Hub, with a card; again to update."""
    with one_sentence_errors():
        import diffusers
        import transformers

        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
            library.utils.logging.set_verbosity_error()
        try:
            from llamagen_hf.hub import publish as publish_folder
        except ImportError as error:
            raise ValueError(f"{error}; publishing needs `pip install llamagen-hf[train]`.") from error
        for url in publish_folder(folder, repo_id, private, space, license, draw):
            typer.echo(f"Published {url}")


@app.command()
def demo(
    checkpoint: Checkpoint = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port. Default: the first free one from 7860 on.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Also open a public link, through Gradio's servers.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: an accelerator, if any.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. Default: float32 on a CPU, else bfloat16.")
    ] = None,
):
    """Start the app of the Gradio Space on this machine, and open it in a browser at the address it prints."""
    with one_sentence_errors():
        try:
            from llamagen_hf.demo import build_demo, launch
        except ImportError as error:
            raise ValueError(f"{error}; the app needs `pip install llamagen-hf[demo]`.") from error
        launch(build_demo(checkpoint, device, dtype), server_name=host, server_port=port, share=share)


def add_stage(name: str, module_function: str, help: str) -> None:
    """A stage of `pipelines/` as a command; it reads its own flags, one for each field of its recipe."""

    @app.command(
        name, help=help, add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )  # fmt: skip
    def run(context: typer.Context):
        try:
            from llamagen_hf import stages
        except ImportError as error:
            typer.secho(f"Error: {error}; training needs `pip install llamagen-hf[train]`.", fg="red", err=True)
            raise typer.Exit(1) from error
        getattr(stages, module_function)(help, context.args)


add_stage("prepare", "prepare", "Choose (filter), score or recaption pictures from the web. --config RECIPE")
add_stage("train-tokenizer", "train_tokenizer", "Train the image tokenizer. --config RECIPE [--override ...]")
add_stage("extract-codes", "extract_codes", "Turn pictures into codes, once. --config RECIPE [--override ...]")
add_stage("train-generator", "train_generator", "Train the generator on codes. --config RECIPE [--override ...]")


if __name__ == "__main__":
    app()
