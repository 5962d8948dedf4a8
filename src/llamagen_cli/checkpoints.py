"""`llamagen convert | publish`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import Dtype, app, one_sentence_errors, quiet_loading


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
    dtype: Annotated[Dtype | None, typer.Option(help="Default: as released.")] = None,
):
    """Turn released LlamaGen files into a pipeline folder."""
    with one_sentence_errors():
        import torch

        from llamagen_hf.llamagen.conversion import convert_checkpoint

        names = None
        if id2label is not None:
            try:
                names = json.loads(id2label.read_text(encoding="utf-8-sig"))
                names = {int(key): str(value) for key, value in names.items()}
            except (ValueError, AttributeError, OSError) as error:
                raise ValueError(f"{str(id2label)!r} is not a JSON object of class names by id.") from error
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
            typer.echo("Without --text-encoder the pipeline takes prompt_embeds only, not prompts.", err=True)


@app.command()
def publish(
    folder: Annotated[
        Path, typer.Argument(help="Pipeline, CLIP, classifier, LoRA adapter or codes, as a training wrote them.")
    ],
    repo_id: Annotated[str, typer.Argument(help="Where on the Hub: user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    space: Annotated[bool, typer.Option("--space", help="Also make a Space that shows the pipeline.")] = False,
    license: Annotated[str | None, typer.Option(help="The Hub's name of the licence, such as cc-by-4.0.")] = None,
    data_license: Annotated[
        str | None, typer.Option(help="Licence of the training data. Default: what the Hub says of its dataset.")
    ] = None,
    draw: Annotated[
        bool, typer.Option("--draw/--no-draw", help="Generate a sample sheet for the card if the folder has none.")
    ] = True,
):
    """Publish on the Hub, with a card; again to update."""
    with one_sentence_errors():
        quiet_loading()
        try:
            from llamagen_hf.publishing.publish import publish as publish_folder
        except ImportError as error:
            raise ValueError(f"{error}; publishing needs `pip install llamagen-hf[train]`.") from error
        for url in publish_folder(folder, repo_id, private, space, license, draw, data_license=data_license):
            typer.echo(f"Published {url}")
