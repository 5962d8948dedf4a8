"""`llamagen compare-tokenizers | compare-upsamplers`."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from .app import Dtype, app, check_writable, find_device, load_pipeline, one_sentence_errors, quiet_loading
from .evaluate import read_prompts


@app.command()
def compare_tokenizers(
    source: Annotated[str, typer.Argument(help="Images: a folder, an .npz of ADM's kind, or a dataset's Hub id.")],
    autoencoders: Annotated[
        list[str],
        typer.Argument(
            metavar="AUTOENCODER...",
            help="Folders or Hub ids: LlamaGen's tokenizers, autoencoders of diffusers, Janus, or pipelines with one; "
            "emoji for the one that ships with llamagen.",
        ),
    ],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side to crop and resize to. Default: as the images are.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    count: Annotated[int | None, typer.Option(min=1, help="Use only the first images. Default: all.")] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "test",
    inception: Annotated[
        Path | None, typer.Option(help="Inception's weights, torch-fidelity's file: adds the column rFID.")
    ] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="Add the column LPIPS.")] = False,
    vgg16: Annotated[
        str, typer.Option(help="VGG16 for --lpips: a folder, a file or a Hub id.")
    ] = "timm/vgg16.tv_in1k",
    output: Annotated[
        Path | None, typer.Option(help="File to write: .md for the table, .json for the numbers.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: an accelerator, if any.")] = None,
):
    """Measure how well image tokenizers reconstruct images, and print one table."""
    with one_sentence_errors():
        check_output(output)
        try:
            from llamagen_hf.autoencoders import load_autoencoder
            from llamagen_hf.evaluation.images import open_images
            from llamagen_hf.evaluation.inception import InceptionFeatures
            from llamagen_hf.evaluation.reconstruction import PerceptualLoss
            from llamagen_hf.evaluation.tokenizers import compare_tokenizers, evaluate_tokenizer

            quiet_loading()
            device = find_device(device)
            images = open_images(source, image_size, split)
            extractor = None if inception is None else InceptionFeatures(inception, device)
            perceptual_loss = PerceptualLoss.from_pretrained(vgg16).to(device) if lpips else None
            results = []
            for path in autoencoders:  # one at a time in memory
                autoencoder = load_autoencoder(path).to(device)
                results.append(
                    evaluate_tokenizer(autoencoder, images, extractor, perceptual_loss, batch_size, count, name=path)
                )
        except ImportError as error:
            raise ValueError(f"{error}; comparing tokenizers needs `pip install llamagen-hf[evaluation]`.") from error
        write_table(compare_tokenizers(results), {"images": images.name, "tokenizers": results}, output)


@app.command()
def compare_upsamplers(
    source: Annotated[str, typer.Argument(help="Large images: a folder, an .npz, or a dataset's Hub id.")],
    upsamplers: Annotated[
        list[str], typer.Argument(metavar="UPSAMPLER...", help="Folders or Hub ids of pipelines that enlarge images.")
    ],
    small_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the small images. Default: half of the large ones'.")
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(help="Also encode and decode the small images by this image tokenizer, as a base draws them."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with the prompt of each image on a line.")] = None,
    aug_level: Annotated[
        float | None, typer.Option(help="Noise to add to the small images, 0 to 1. Default: the checkpoint's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps for an image. Default: the checkpoint's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i is enlarged with seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    count: Annotated[int | None, typer.Option(min=1, help="Use only the first images. Default: all.")] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "test",
    inception: Annotated[
        Path | None, typer.Option(help="Inception's weights, torch-fidelity's file: adds the column FID.")
    ] = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="Add the column LPIPS.")] = False,
    vgg16: Annotated[
        str, typer.Option(help="VGG16 for --lpips: a folder, a file or a Hub id.")
    ] = "timm/vgg16.tv_in1k",
    output: Annotated[
        Path | None, typer.Option(help="File to write: .md for the table, .json for the numbers.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: an accelerator, if any.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the checkpoints. Default: float32.")] = None,
):
    """Reduce images, enlarge them again, and print one table: bicubic enlargement and the upsamplers."""
    with one_sentence_errors():
        check_output(output)
        texts = None if prompts is None else read_prompts(prompts)
        try:
            from llamagen_hf.autoencoders import load_autoencoder
            from llamagen_hf.evaluation.images import open_images
            from llamagen_hf.evaluation.inception import InceptionFeatures
            from llamagen_hf.evaluation.reconstruction import PerceptualLoss
            from llamagen_hf.evaluation.upsamplers import compare_upsamplers, evaluate_upsampler

            device = find_device(device)
            extractor = None if inception is None else InceptionFeatures(inception, device)
            perceptual_loss = PerceptualLoss.from_pretrained(vgg16).to(device) if lpips else None
            results, images, redraws = [], None, None
            for path in upsamplers:  # one at a time in memory
                pipe = load_pipeline(path, device, dtype)
                pipe.set_progress_bar_config(disable=True)
                if images is None:
                    images, side = open_images(source, pipe.image_size, split), pipe.image_size
                    redraws = None if autoencoder is None else load_autoencoder(autoencoder).to(device)
                if pipe.image_size != side:
                    raise ValueError(
                        f"Only upsamplers to one size can be compared: {path!r} makes {pipe.image_size} pixels, "
                        f"{upsamplers[0]!r} {side}."
                    )
                settings = {"aug_level": aug_level, "num_inference_steps": steps}
                results.append(
                    evaluate_upsampler(
                        pipe, images, small_size or side // 2, redraws, texts, extractor, perceptual_loss, batch_size,
                        count, seed, name=path, **settings,
                    )
                )  # fmt: skip
        except ImportError as error:
            raise ValueError(f"{error}; comparing upsamplers needs `pip install llamagen-hf[evaluation]`.") from error
        numbers = {"images": images.name, "small_size": small_size or side // 2, "autoencoder": autoencoder}
        write_table(compare_upsamplers(results), numbers | {"upsamplers": results}, output)


def check_output(output: Path | None) -> None:
    """Raise a `ValueError` unless a table or its numbers can be written to `output`."""
    if output is not None:
        if output.suffix.lower() not in (".md", ".json"):
            raise ValueError(f"The output {str(output)!r} must end in .md or .json.")
        check_writable(output)


def write_table(table: str, numbers: dict, output: Path | None) -> None:
    """Print a table, and write it, or the numbers, by the ending of `output`."""
    from llamagen_hf.files import replacing

    typer.echo(table)
    if output is None:
        return
    text = table
    if output.suffix.lower() == ".json":
        lists = {name: value for name, value in numbers.items() if isinstance(value, list)}
        finite = {
            name: [{key: "inf" if value == math.inf else value for key, value in row.items()} for row in rows]
            for name, rows in lists.items()
        }
        text = json.dumps(numbers | finite, indent=2, allow_nan=False)
    with replacing(output) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")
