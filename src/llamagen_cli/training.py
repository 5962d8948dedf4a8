"""`llamagen prepare | train-tokenizer | extract-codes | train-generator`."""

import typer

from .app import app


def add_stage(name: str, module_function: str, help: str) -> None:
    """A stage of `pipelines/` as a command; it reads its own flags, one for each field of its recipe."""

    @app.command(
        name, help=help, add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )  # fmt: skip
    def run(context: typer.Context):
        try:
            from llamagen_cli import stages
        except ImportError as error:
            typer.secho(f"Error: {error}; training needs `pip install llamagen-hf[train]`.", fg="red", err=True)
            raise typer.Exit(1) from error
        getattr(stages, module_function)(help, context.args)


add_stage("prepare", "prepare", "Choose (filter), score or recaption images from the web. --config RECIPE")
add_stage("train-tokenizer", "train_tokenizer", "Train the image tokenizer. --config RECIPE [--override ...]")
add_stage("extract-codes", "extract_codes", "Turn images into codes, once. --config RECIPE [--override ...]")
add_stage("train-generator", "train_generator", "Train the generator on codes. --config RECIPE [--override ...]")
