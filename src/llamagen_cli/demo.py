"""`llamagen demo`."""

from typing import Annotated

import typer

from .app import Checkpoint, Device, DtypeOrAuto, Quantization, Upsampler, app, one_sentence_errors


@app.command()
def demo(
    checkpoint: Checkpoint = None,
    upsampler: Upsampler = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port. Default: the first free one from 7860 on.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Also open a public link, through Gradio's servers.")] = False,
    device: Device = None,
    dtype: Annotated[
        DtypeOrAuto | None, typer.Option(help="auto: the fastest here. Default: float32 on a CPU, else bfloat16.")
    ] = None,
    quantization: Quantization = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the generator; the first images take longer, the others less.")
    ] = False,
):
    """Start the app of the Gradio Space on this machine, and open it in a browser at the address it prints."""
    with one_sentence_errors():
        try:
            from llamagen_hf.demo import build_demo, launch
        except ImportError as error:
            raise ValueError(f"{error}; the app needs `pip install llamagen-hf[demo]`.") from error
        launch(
            build_demo(checkpoint, device, dtype, upsampler, quantization, compile),
            server_name=host,
            server_port=port,
            share=share,
        )
