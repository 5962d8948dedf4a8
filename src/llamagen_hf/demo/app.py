"""The app: its parts and what they do."""

from functools import partial
from pathlib import Path

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from ..families import load_pipeline
from .studio import MAX_COUNT, MAX_PROMPT, PREVIEWS, Studio
from .style import CSS, THEME


QUEUE_SIZE = 40  # drawings that wait
MAX_FILE_SIZE = "20mb"
EXAMPLES = ["a red apple", "a golden retriever in the snow", "a lighthouse at dusk"]


def build_demo(checkpoint: str | None = None, device: str | None = None, dtype: str | None = None) -> gr.Blocks:
    """Build the app around a checkpoint.

    Args:
        checkpoint (`str`, *optional*): Folder or Hub id; the emoji checkpoint that ships with the package by default.
        device (`str`, *optional*): An accelerator if there is one, else the CPU.
        dtype (`str`, *optional*): `"float32"` on a CPU, else `"bfloat16"`.

    Returns:
        `gradio.Blocks`: Ready to [`launch`].

    Raises:
        OSError: In one sentence, if there is no such checkpoint.
    """
    if device is None:
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    pipe = load_pipeline(checkpoint, dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return lay_out(pipe, read_examples(pipe, checkpoint), title(checkpoint))


def launch(demo: gr.Blocks, **kwargs):
    """Start the app; arguments and result are those of [`gradio.Blocks.launch`]."""
    return demo.launch(**{"theme": THEME, "css": CSS, "max_file_size": MAX_FILE_SIZE} | kwargs)


def title(checkpoint: str | None) -> str:
    """What a checkpoint is called where everyone reads it: of a folder no more than its name."""
    return Path(checkpoint).name if checkpoint and Path(checkpoint).is_dir() else checkpoint or "emoji"


def read_examples(pipe: DiffusionPipeline, checkpoint: str | None) -> list:
    """Prompts of the widget in the checkpoint's card, or some others; class ids for a class-conditional one."""
    if not pipe.is_text_conditional:
        return sorted({pipe.transformer.config.num_classes * i // 5 for i in range(5)})
    folder = pipe.find_checkpoint(checkpoint)
    try:
        card = ModelCard.load(folder / "README.md" if (folder / "README.md").is_file() else checkpoint)
        prompts = [entry["text"] for entry in card.data.get("widget") or [] if "text" in entry]
    except Exception:  # a card is for people, and may be missing or anything
        prompts = []
    return prompts or EXAMPLES


def lay_out(pipe: DiffusionPipeline, examples: list, name: str, queue_size: int = QUEUE_SIZE) -> gr.Blocks:
    """The parts of the app and their events."""
    studio, config = Studio(pipe, name), pipe.transformer.config

    def settings() -> list[gr.components.Component]:
        values = pipe.sampling_settings()
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                # No gr.Number: an empty one turns into 0. The value is a default for clients of the API.
                seed = gr.Textbox("", label="Seed", placeholder="random", max_length=16, min_width=100)
                count = gr.Slider(1, MAX_COUNT, 1, step=1, label="Images", min_width=100)
            with gr.Row():
                scale = gr.Slider(
                    1, max(10, values["guidance_scale"]), values["guidance_scale"], step=0.5, label="Guidance",
                    info="1 is off, and twice as fast.", min_width=140,
                )  # fmt: skip
                temperature = gr.Slider(
                    0, max(2, values["temperature"]), values["temperature"], step=0.05, label="Temperature",
                    info="0 takes the likeliest code.", min_width=140,
                )  # fmt: skip
            with gr.Row():
                top_k = gr.Slider(
                    0, config.vocab_size, values["top_k"], step=1, label="Top k",
                    info="Likeliest codes, 0 for all.", min_width=140,
                )  # fmt: skip
                top_p = gr.Slider(
                    0, 1, values["top_p"], step=0.01, label="Top p",
                    info="Their probability, 1 for all.", min_width=140,
                )  # fmt: skip
            preview = gr.Radio(PREVIEWS, value=PREVIEWS[0], label="Preview")
        return [scale, temperature, top_k, top_p, seed, count, preview]

    def ask() -> gr.components.Component:
        if pipe.is_text_conditional:
            return gr.Textbox(
                label="Prompt", placeholder="What to draw", lines=1, max_lines=3, max_length=MAX_PROMPT,
                elem_classes="ask",
            )  # fmt: skip
        if config.id2label:
            names = [(f"{label} ({index})", index) for index, label in config.id2label.items()]
            return gr.Dropdown(names, value=names[0][1], label="Class", filterable=True, elem_classes="ask")
        return gr.Number(0, label="Class", precision=0, minimum=0, maximum=config.num_classes - 1, elem_classes="ask")

    def show() -> tuple:
        gallery = gr.Gallery(
            show_label=False, columns=1, object_fit="contain", format="png", interactive=False,
            buttons=["download", "fullscreen"], elem_classes="easel", height=None,
        )  # fmt: skip
        with gr.Row(elem_classes="below"):
            status = gr.Markdown("", elem_classes="status")
            share = gr.DownloadButton("Save PNG", size="sm", interactive=False, elem_classes="share")
        return gallery, status, share

    def buttons() -> tuple[gr.Button, gr.Button]:
        with gr.Row(elem_classes="go"):
            return gr.Button("Draw", variant="primary"), gr.Button("Stop", interactive=False)

    def connect(triggers, examples, stop, go, function, inputs, outputs, api_name) -> None:
        """Run `function` on the triggers and after an example; buttons and status say what is going on meanwhile."""
        status = outputs[1]
        on, off = gr.update(interactive=True), gr.update(interactive=False)

        def busy():
            return off, on, "Waiting ..."

        def idle(text=None):
            return on, off, gr.skip() if text is None else text

        hidden = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        started = [gr.on(triggers, busy, None, [go, stop, status], **hidden)]
        if examples is not None:
            started.append(examples.load_input_event.then(busy, None, [go, stop, status], **hidden))
        runs = []
        for event in started:
            run = event.then(
                function, inputs, outputs, show_progress="hidden", concurrency_id="draw", concurrency_limit=1,
                api_name=api_name, api_visibility="private" if runs else "public",
            )  # fmt: skip
            # Both, since `then` is not called in the browser after an error.
            run.success(idle, None, [go, stop, status], **hidden)
            # A drawing that is cancelled fails too, before or after what the stop button does.
            run.failure(partial(idle, "Stopped."), None, [go, stop, status], **hidden)
            runs.append(run)
        stop.click(partial(idle, "Stopped."), None, [go, stop, status], cancels=runs, **hidden)

    with gr.Blocks(title=f"llamagen: {name}", delete_cache=(600, 3600), analytics_enabled=False) as demo:
        gr.Markdown(
            f"# llamagen\n\n**{name}**: a Llama writes an image code by code, {config.num_codes} of them, "
            f"from the top left to the bottom right."
        )
        with gr.Tabs():
            with gr.Tab("Text" if pipe.is_text_conditional else "Class"):
                with gr.Row(elem_classes="bench"):
                    with gr.Column(elem_classes="asks"):
                        condition = ask()
                        go, stop = buttons()
                    with gr.Column(elem_classes="shows"):
                        gallery, status, share = show()
                    with gr.Column(elem_classes="more"):
                        samples = gr.Examples(
                            [[value] for value in examples], condition, label="Examples", cache_examples=False,
                            example_labels=[(config.id2label or {}).get(value, str(value)) for value in examples],
                        )  # fmt: skip
                        chosen = settings()
                        with gr.Accordion("Parameters", open=False):
                            parameters = gr.Code(language="json", show_label=False, interactive=False, max_lines=18)
                triggers = [go.click] + ([condition.submit] if pipe.is_text_conditional else [])
                outputs = [gallery, status, parameters, share]
                connect(triggers, samples, stop, go, studio.draw, [condition, *chosen], outputs, "draw")
            with gr.Tab("Complete"):
                with gr.Row(elem_classes="bench"):
                    with gr.Column(elem_classes="asks"):
                        image = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"], height=220)
                        # The file as it came, so that it is opened where a refusal is put in words.
                        image.preprocess = lambda payload: payload and payload.path
                        rows = gr.Slider(
                            0, config.grid_size - 1, config.grid_size // 2, step=1, label="Rows to keep",
                            info=f"From the top, of {config.grid_size}.",
                        )  # fmt: skip
                        condition = ask()
                        go, stop = buttons()
                    with gr.Column(elem_classes="shows"):
                        gallery, status, share = show()
                    with gr.Column(elem_classes="more"):
                        chosen = settings()
                        with gr.Accordion("Parameters", open=False):
                            parameters = gr.Code(language="json", show_label=False, interactive=False, max_lines=18)
                gr.on(
                    [image.change, rows.release], studio.keep, [image, rows], [gallery, status],
                    show_progress="hidden", api_visibility="private",
                )  # fmt: skip
                triggers = [go.click] + ([condition.submit] if pipe.is_text_conditional else [])
                outputs = [gallery, status, parameters, share]
                inputs = [image, rows, condition, *chosen]
                connect(triggers, None, stop, go, studio.complete, inputs, outputs, "complete")
    return demo.queue(max_size=queue_size, default_concurrency_limit=1)
