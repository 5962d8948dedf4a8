"""`llamagen evaluate`."""

import json
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Literal

import typer

from .app import app, find_device, one_sentence_errors


SHEET = 24  # images on a report's sheet


@app.command()
def evaluate(
    subjects: Annotated[
        list[str],
        typer.Argument(help="Checkpoints of any diffusers pipelines to generate from; or images: folder, .npz."),
    ],
    reference: Annotated[str, typer.Option(help="Images to compare with: a folder, .npz, or dataset; or statistics.")],
    output: Annotated[Path, typer.Option(help="Folder for the reports and the generated images.")],
    preset: Annotated[
        Literal["imagenet256_paper", "demo"] | None, typer.Option(help="Settings of the paper, or of the demo.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, help="Images to generate. Default: the preset's, or the reference's.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt per line. Default: classes.")] = None,
    classes: Annotated[Literal["random", "balanced"], typer.Option(help="How to choose classes.")] = "random",
    num_classes: Annotated[int | None, typer.Option(help="Number of classes, if the pipeline has none.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i is generated with seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    guidance_scale: Annotated[
        list[float] | None, typer.Option(help="Several for a sweep. Default: the checkpoint's.")
    ] = None,
    argument: Annotated[
        list[str] | None, typer.Option(help="More arguments for the pipelines' calls, as name=value: top_k=0.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side to bring all images to.")] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "test",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that can't be used.")] = False,
    inception: Annotated[
        Path | None, typer.Option(help="File with Inception's weights. Default: torch-fidelity downloads it.")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP model for CLIP score and R-precision of prompts.")] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Also write the generated images as .npz for ADM's evaluator.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: an accelerator, if any.")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Dtype of the checkpoints.")
    ] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run generated into the output folder.")
    ] = False,
):
    """Generate from checkpoints and measure FID, sFID, Inception Score, precision, recall and KID; write reports.

    On several GPUs: `accelerate launch pipelines/evaluate.py`, with the same arguments.
    """
    with one_sentence_errors():
        arguments = read_arguments(argument or [])
        texts = None if prompts is None else read_prompts(prompts)
        from llamagen_hf.evaluation.inception import InceptionFeatures
        from llamagen_hf.evaluation.report import write_report
        from llamagen_hf.evaluation.run import EvaluationConfig
        from llamagen_hf.evaluation.run import evaluate as run
        from llamagen_hf.evaluation.sampling import pack_images
        from llamagen_hf.processes import leave_processes, this_process

        device = str(this_process().device) if device is None else find_device(device)
        config = EvaluationConfig(
            subjects=subjects,
            reference=reference,
            output_dir=str(output),
            preset=preset,
            count=count,
            prompts=texts,
            classes=classes,
            num_classes=num_classes,
            seed=seed,
            batch_size=batch_size,
            guidance_scales=guidance_scale,
            arguments=arguments,
            image_size=image_size,
            split=split,
            skip_bad=skip_bad,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
        )
        try:
            extractor = InceptionFeatures(inception, device)
        except ImportError as error:
            raise ValueError(str(error)) from error
        models = None
        if clip is not None:
            from llamagen_hf.clip import load_clip

            models = load_clip(clip)
        for results in run(config, extractor, models):
            source = results.pop("samples")
            folder = output / results["title"].replace("/", "--")
            typer.echo(f"{results['title']}: {json.dumps(results['metrics'])}")
            page = write_report(folder, results, *select_images(source, config, results))
            typer.echo(f"Wrote {page}")
            if pack and Path(source).is_dir() and "checkpoint" in results:
                pack_images(source, folder / "samples.npz")
                typer.echo(f"Wrote {folder / 'samples.npz'}")
        leave_processes()


def read_arguments(pairs: list[str]) -> dict:
    """`name=value` as arguments of a call: numbers, true, false and null as in JSON, anything else as text."""
    arguments = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"`--argument` is {pair!r}; expected name=value.")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty; a `ValueError` if there are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The prompts {str(path)!r} can't be read: {error}.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"The file {str(path)!r} holds no prompts.")
    return prompts


def select_images(source, config, results: dict) -> tuple[list[tuple], dict[str, list]]:
    """The first images with their prompts, and the first image of each prompt that is among the worst or the best."""
    from PIL import Image

    from llamagen_hf.evaluation.images import open_images
    from llamagen_hf.evaluation.report.results import worst_and_best

    wanted = {entry["name"] for entries in worst_and_best(results) for entry in entries}
    images = open_images(source, config.image_size, config.split, skip_bad=config.skip_bad)
    prompts, sheet, found = config.prompts or [""], [], {}
    count = max(SHEET, len(prompts)) if wanted else SHEET
    for image, prompt in zip(islice(images, count), cycle(prompts), strict=False):
        image = Image.fromarray(image)
        if len(sheet) < SHEET:
            sheet.append((image, prompt))
        if prompt in wanted:
            found.setdefault(prompt, [image])
    return sheet, found
