"""`llamagen serve`."""

import re
from typing import Annotated, Literal

import typer

from .app import DtypeOrAuto, Quantization, app, one_sentence_errors


@app.command()
def serve(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Folder or Hub id. Default: emoji, which ships with llamagen (a folder: ./emoji)."),
    ] = None,
    upsampler: Annotated[
        str | None, typer.Option(help="Pipeline that enlarges its images: a folder or Hub id. Of a cascade: its own.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8000,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, ... Default: an accelerator, if any.")] = None,
    dtype: Annotated[
        DtypeOrAuto | None,
        typer.Option(help="Type of the weights; auto: the fastest here. Default: float32 on a CPU, else bfloat16."),
    ] = None,
    decoding_window: Annotated[
        int, typer.Option(min=1, help="Codes of an image that a step may draw while few images are drawn.")
    ] = 1,
    quantization: Quantization = None,
    slots: Annotated[
        int, typer.Option(min=2, help="Streams generated at once: an image takes one, or two with guidance.")
    ] = 64,
    engine: Annotated[
        Literal["local", "vllm"],
        typer.Option(help="local: one device; vllm: as many GPUs as --tensor-parallel-size says."),
    ] = "local",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that vLLM splits the generator over.")] = 1,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the generator; the first images then take longer.")
    ] = False,
    model_name: Annotated[str | None, typer.Option(help="Name in the API. Default: the checkpoint's.")] = None,
    max_pending: Annotated[int, typer.Option(min=1, help="Images that may wait or be generated; more get 429.")] = 256,
    max_images: Annotated[int, typer.Option(min=1, help="Images of one request.")] = 10,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that a request may take.")] = 300.0,
    cache_mb: Annotated[int, typer.Option(min=0, help="Finished images to keep for the same request, in MiB.")] = 256,
    url_mb: Annotated[int, typer.Option(min=1, help="Images to keep for response_format=url, in MiB.")] = 256,
    url_seconds: Annotated[float, typer.Option(min=1, help="How long they can be fetched.")] = 3600.0,
    public_url: Annotated[
        str | None, typer.Option(help="Beginning of their addresses. Default: the address that the client used.")
    ] = None,
    response_format: Annotated[
        Literal["b64_json", "url"],
        typer.Option(help="For requests that do not say which: the image itself, or its address."),
    ] = "b64_json",
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Scale images to sizes that the checkpoint does not generate.")
    ] = False,
    cors_origins: Annotated[
        str | None,
        typer.Option(help="Web pages that may call the server, such as https://example.com; with commas, or *."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LLAMAGEN_API_KEY", help="Key that clients must send. Default: none.")
    ] = None,
    rate_limit: Annotated[str | None, typer.Option(help="Requests of one client address, such as 60/minute.")] = None,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Size of a request, in MiB.")] = 16,
    drain_seconds: Annotated[float, typer.Option(min=0, help="How long active requests have after SIGTERM.")] = 120.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    on_engine_death: Annotated[
        Literal["restart", "exit"],
        typer.Option(help="restart: load the engine again; exit: end with a non-zero status."),
    ] = "restart",
):
    """Serve OpenAI's images API; `openai.OpenAI(base_url="http://127.0.0.1:8000/v1")` is a client."""
    with one_sentence_errors():
        try:
            import limits
            import uvicorn  # noqa: F401

            from llamagen_hf.serving.server import serve as run
        except ImportError as error:
            raise ValueError(f"{error}; the server needs `pip install llamagen-hf[serve]`.") from error
        import torch

        from llamagen_hf.llamagen.serving.frontend import LlamaGenFrontend
        from llamagen_hf.loading.precision import resolve_dtype
        from llamagen_hf.local_paths import public_name
        from llamagen_hf.serving.local_engine import LocalEngine
        from llamagen_hf.serving.service import ImageService
        from llamagen_hf.serving.settings import ServingSettings

        from .app import find_device, quiet_loading

        if engine == "local" and tensor_parallel_size > 1:
            raise ValueError("`--tensor-parallel-size` belongs to `--engine vllm`.")
        origins = tuple(origin.strip().rstrip("/") for origin in (cors_origins or "").split(",") if origin.strip())
        for origin in origins:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(
                    f"`--cors-origins` holds {origin!r}; expected something like https://example.com, or *."
                )
        if rate_limit is not None:
            try:
                limits.parse(rate_limit)
            except ValueError as error:
                raise ValueError(f"`--rate-limit` is {rate_limit!r}; expected something like 60/minute.") from error
        if max_pending < max_images:
            raise ValueError("`--max-pending` must be at least `--max-images`, else some requests would never fit.")
        quiet_loading()
        device = find_device(device)
        dtype = resolve_dtype(dtype or ("float32" if device == "cpu" else "bfloat16"), device)
        frontend, generator, base = load_frontend(checkpoint, upsampler, device, dtype, quantization)
        restarts = on_engine_death == "restart"
        if engine == "vllm":
            if not isinstance(generator, LlamaGenFrontend):
                raise ValueError(
                    "vLLM draws codes of LlamaGen, but this checkpoint draws pixels: use `--engine local`."
                )
            if decoding_window != 1:
                raise ValueError("`--decoding-window` needs `--engine local`.")
            if "quantization" in generator.facts:
                raise ValueError("A quantized generator needs `--engine local`.")
            try:
                import vllm  # noqa: F401
            except ImportError as error:
                raise ValueError(f"{error}; `--engine vllm` needs `pip install llamagen-hf[serve,vllm]`.") from error
            from llamagen_hf.llamagen.serving.vllm_engine import VLLMBackend

            parallel = {"tensor_parallel_size": tensor_parallel_size, "enforce_eager": not compile}
            backend = VLLMBackend(base, max(1, slots // 2), restarts, dtype=str(dtype)[6:], **parallel)
        else:
            threads = None
            if device == "cpu":  # two processes with all cores each would slow each other down
                # An upsampler works as hard as the engine does.
                own = 1 if frontend is generator else max(1, torch.get_num_threads() // 2)
                threads = max(1, torch.get_num_threads() - own)
                torch.set_num_threads(own)
            load = generator.batch_loader(slots, compile, threads, decoding_window)
            backend = LocalEngine(load, generator.capacity(slots), restarts)
        if model_name is None:
            model_name = re.sub(r"[^\w./-]", "-", public_name(frontend.facts["checkpoint"]))
        settings = ServingSettings(
            model_name=model_name,
            max_pending=max_pending,
            max_images=max_images,
            timeout=timeout,
            cache_bytes=cache_mb * 2**20,
            url_bytes=url_mb * 2**20,
            url_seconds=url_seconds,
            public_url=public_url,
            response_format=response_format,
            any_size=any_size,
            cors_origins=origins,
            api_key=api_key,
            rate_limit=rate_limit,
            max_body_bytes=max_body_mb * 2**20,
            drain_seconds=drain_seconds,
            log_prompts=log_prompts,
        )
        run(ImageService(frontend, backend, settings), host, port)


def load_frontend(checkpoint: str | None, upsampler: str | None, device: str, dtype, quantization: str | None = None):
    """The frontend of a checkpoint, that of the generator within it, and the generator's checkpoint, for engines."""
    from diffusers import DiffusionPipeline

    from llamagen_hf import PixelDiffusionPipeline
    from llamagen_hf.imagen.serving.frontend import CascadeFrontend
    from llamagen_hf.loading.checkpoint import CheckpointLoaderMixin
    from llamagen_hf.loading.parts import load_part
    from llamagen_hf.unclip.serving.frontend import DECODERS, PriorDecoderFrontend

    folder, base, origin = CheckpointLoaderMixin.find_checkpoint(checkpoint), checkpoint, None
    name = DiffusionPipeline.load_config(folder)["_class_name"]
    if name == "CascadePipeline":
        if upsampler is not None:
            raise ValueError("This checkpoint is a cascade and has an upsampler; leave `--upsampler` out.")
        base, origin = str(folder / "base"), checkpoint
        name = DiffusionPipeline.load_config(base)["_class_name"]
    if name == "PriorDecoderPipeline":
        small = PriorDecoderFrontend.from_pretrained(base, device, dtype, quantization)
        generator, base = small.decoder, str(CheckpointLoaderMixin.find_checkpoint(base) / "decoder")
    elif name in DECODERS:
        small = generator = DECODERS[name].from_pretrained(base, device, dtype, quantization)
    else:
        raise ValueError(
            f"A {name} can't be served; expected an AutoregressiveImagePipeline, a PixelDiffusionPipeline, a "
            "PriorDecoderPipeline, or a cascade with one of these as its base."
        )
    if origin is not None:
        large = load_part(folder / "upsampler", dtype=dtype)
    elif upsampler is not None:
        large = PixelDiffusionPipeline.from_pretrained(upsampler, dtype=dtype)
    else:
        return small, generator, base
    return CascadeFrontend(small, large.to(device), origin), generator, base
