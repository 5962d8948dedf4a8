"""`llamagen compare-tokenizers`."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from .app import app, check_writable, find_device, one_sentence_errors, quiet_loading


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
        if output is not None:
            if output.suffix.lower() not in (".md", ".json"):
                raise ValueError(f"The output {str(output)!r} must end in .md or .json.")
            check_writable(output)
        try:
            from llamagen_hf.autoencoders import load_autoencoder
            from llamagen_hf.evaluation.images import open_images
            from llamagen_hf.evaluation.inception import InceptionFeatures
            from llamagen_hf.evaluation.reconstruction import PerceptualLoss
            from llamagen_hf.evaluation.tokenizers import compare_tokenizers, evaluate_tokenizer
            from llamagen_hf.files import replacing

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
        text = table = compare_tokenizers(results)
        typer.echo(table)
        if output is not None:
            if output.suffix.lower() == ".json":
                numbers = [
                    {key: "inf" if value == math.inf else value for key, value in row.items()} for row in results
                ]
                text = json.dumps({"images": images.name, "tokenizers": numbers}, indent=2, allow_nan=False)
            with replacing(output) as partial:
                partial.write_text(f"{text}\n", encoding="utf-8")
