"""`llamagen join`."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from .app import app, one_sentence_errors, quiet_loading


@app.command()
def join(
    first: Annotated[str, typer.Argument(help="Folder or Hub id of a prior, or of the base of a cascade.")],
    second: Annotated[str, typer.Argument(help="That of the prior's decoder, or of the cascade's upsampler.")],
    output: Annotated[Path, typer.Argument(help="Folder to save both to.")],
):
    """Save a prior with its decoder, or a base with its upsampler, as one checkpoint."""
    with one_sentence_errors():
        quiet_loading()
        typer.echo(f"Saved {output}, for {join_checkpoints(first, second, output)}.from_pretrained")


def join_checkpoints(first: str, second: str, output: Path) -> str:
    """Save two checkpoints as one, with what their trainings recorded, for a card.

    Args:
        first (`str`): A prior, or the base of a cascade: a folder or a Hub id.
        second (`str`): The prior's decoder, or the cascade's upsampler.
        output (`Path`): Where to; replaced if it holds a pipeline of that kind.

    Returns:
        `str`: Name of the class of the whole.

    Raises:
        OSError: There are no such checkpoints, or `output` holds something else.
        ValueError: They do not belong together.
    """
    from llamagen_hf import CascadePipeline, EmbeddingPriorPipeline, PriorDecoderPipeline
    from llamagen_hf.families import load_pipeline
    from llamagen_hf.files import replace_result
    from llamagen_hf.training.record import FACTS_FILE

    paths, parts = (first, second), [load_pipeline(path) for path in (first, second)]
    whole = (PriorDecoderPipeline if isinstance(parts[0], EmbeddingPriorPipeline) else CascadePipeline)(*parts)
    kind, index = type(whole).__name__, output / whole.config_name
    if output.exists() and not index.is_file():
        raise OSError(f"{str(output)!r} exists and holds something else; choose another folder.")
    if index.is_file() and json.loads(index.read_text(encoding="utf-8")).get("_class_name") != kind:
        raise OSError(f"{str(output)!r} holds another pipeline; choose another folder.")

    def save(folder: Path) -> None:
        whole.save_pretrained(folder)
        for path, part, name in zip(paths, parts, whole.parts, strict=True):
            facts = part.find_checkpoint(path) / FACTS_FILE
            if facts.is_file():
                shutil.copy(facts, folder / name)

    replace_result(output, whole.config_name, save)
    return kind
