"""The app: its layout, its looks, and which events its parts start."""

from collections.abc import Callable
from functools import partial, wraps
from inspect import Parameter, Signature

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from ..families import find_family, load_pipeline, own_class
from ..loading.checkpoint import find_upsampler
from ..loading.precision import resolve_dtype
from ..loading.quantization import quantize_components
from ..local_paths import public_name
from .sliders import CANDIDATES_SLIDERS, PRIOR_SLIDERS, SLIDERS, UPSAMPLING_SLIDERS
from .studio import MAX_COUNT, MAX_PROMPT, PREVIEWS, Studio


QUEUE_SIZE = 40  # requests that wait
MAX_FILE_SIZE = "20mb"
EXAMPLES = ["a red apple", "a golden retriever in the snow", "a lighthouse at dusk"]

# No font or file is fetched from elsewhere.
THEME = gr.themes.Default(
    primary_hue="orange",
    neutral_hue="stone",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
).set(
    body_background_fill="*neutral_50",
    block_border_width="1px",
    block_radius="*radius_lg",
    block_shadow="0 1px 3px rgb(0 0 0 / 0.05)",
    block_title_text_weight="500",
    button_large_radius="*radius_lg",
    button_secondary_background_fill="white",
    button_secondary_background_fill_dark="*neutral_700",
    button_secondary_border_color="*neutral_200",
    button_secondary_border_color_dark="*neutral_600",
    button_border_width="1px",
    button_primary_border_color="transparent",
    input_border_color_focus="*primary_400",
    input_shadow_focus="none",
    button_primary_background_fill="*primary_600",  # dark enough for white text
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_text_color="white",
)

# On a wide screen inputs are on the left and images on the right; on a narrow one images are below the buttons.
CSS = """
.gradio-container { width: 100%; max-width: 1040px !important; margin: 0 auto !important; }
.bench { display: grid !important; gap: 20px; align-items: start;
  grid-template-columns: minmax(0, 6fr) minmax(0, 5fr); grid-template-rows: auto 1fr;
  grid-template-areas: "asks shows" "more shows"; }
.asks { grid-area: asks; } .shows { grid-area: shows; } .more { grid-area: more; }
.go { flex-wrap: nowrap !important; }
.go button { min-width: 0 !important; }
.go button:first-child { flex-grow: 3; }
.easel .grid-wrap { max-height: none !important; min-height: 0 !important; }
/* Of one height, whether empty or with one image or four and their captions, so that nothing moves. */
.easel .empty { aspect-ratio: 1; height: auto !important; min-height: 0 !important;
  box-sizing: content-box !important; padding-bottom: 22px; }
.easel .thumbnail-item { display: flex; flex-direction: column; height: auto !important; aspect-ratio: auto !important;
  border: none; border-radius: 0; box-shadow: none; background: none; overflow: visible; }
.easel .thumbnail-item img { width: 100%; height: auto !important; aspect-ratio: 1; background: white;
  border-radius: var(--radius-sm); }
.easel .caption-label { position: static; width: 100%; max-width: none; height: 22px; padding: 2px 0; border: none;
  background: none; text-align: center; font-size: var(--text-xs); color: var(--body-text-color-subdued); }
.below { align-items: center; flex-wrap: nowrap !important; min-height: 32px; }
.below .status { color: var(--body-text-color-subdued); flex-grow: 1; }
.below .share { flex-grow: 0; min-width: 96px !important; }
@media (max-width: 760px) {
  .gradio-container { padding: 8px !important; }
  .bench { grid-template-columns: minmax(0, 1fr); grid-template-areas: "asks" "shows" "more"; gap: 12px; }
}
"""


def build_demo(
    checkpoint: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    upsampler: str | None = None,
    quantization: str | None = None,
    compile: bool = False,
) -> gr.Blocks:
    """Build the app around a checkpoint.

    Args:
        checkpoint (`str`, *optional*):
            Folder or Hub id, of a cascade too; the emoji checkpoint that ships with the package by default.
        device (`str`, *optional*): An accelerator if there is one, else the CPU.
        dtype (`str`, *optional*):
            `"float32"` on a CPU, else `"bfloat16"`; `"auto"` also takes bfloat16 on a CPU with instructions for it.
        upsampler (`str`, *optional*):
            Folder or Hub id of an upsampler for the images, or `"none"`. By default the one that ships with the
            package, for the emoji checkpoint and if it ships.
        quantization (`str`, *optional*): Mode of [`~llamagen_hf.loading.quantization.quantize_components`] for the
            generator of codes.
        compile (`bool`, *optional*, defaults to `False`): Whether to compile the step that generates a code. The first
            image, and the first of each other number of images at once, then takes a minute or so.

    Returns:
        `gradio.Blocks`: Ready to [`launch`].

    Raises:
        OSError: If there is no such checkpoint, or it draws no images.
        ValueError: If the checkpoint draws from neither prompts nor classes, if the upsampler does not fit it, or if
            it can't be quantized or compiled so.
    """
    if device is None:
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    dtype = resolve_dtype(dtype or ("float32" if device == "cpu" else "bfloat16"), device)
    options = {}
    if quantization is not None:
        options["quantization_config"] = quantize_components({"transformer": quantization})
    pipe = load_pipeline(checkpoint, draws="images", dtype=dtype, **options).to(device)
    if (quantization is not None or compile) and not hasattr(pipe, "compile_step"):
        raise ValueError("Only models that generate codes are quantized or compiled here.")
    if compile:
        pipe.compile_step()
    if (upsampler := find_upsampler(checkpoint, upsampler)) is not None:
        enlarging = load_pipeline(upsampler, dtype=dtype).to(device)
        pipe = own_class("CascadePipeline")(pipe, enlarging)
    check_drawing(pipe)
    pipe.set_progress_bar_config(disable=True)
    return lay_out(pipe, read_examples(pipe, checkpoint), public_name(checkpoint or "emoji"))


def launch(demo: gr.Blocks, **kwargs):
    """Start the app; arguments and result are those of [`gradio.Blocks.launch`]."""
    return demo.launch(**{"theme": THEME, "css": CSS, "max_file_size": MAX_FILE_SIZE} | kwargs)


def check_drawing(pipe: DiffusionPipeline) -> None:
    """Raise a `ValueError` if a pipeline does not draw from what visitors can say."""
    if pipe.upsamples:
        raise ValueError("This checkpoint enlarges images: pass it as the upsampler of one that draws them.")
    if pipe.condition_kind not in ("text", "class"):
        raise ValueError("This checkpoint draws from noise alone; the app needs one that draws prompts or classes.")


def read_examples(pipe: DiffusionPipeline, checkpoint: str | None) -> list:
    """Prompts of the widget in the checkpoint's card, or some others; class ids for a class-conditional checkpoint."""
    if pipe.condition_kind == "class":
        return sorted({pipe.num_classes * i // 5 for i in range(5)})
    folder = pipe.find_checkpoint(checkpoint)
    try:
        card = ModelCard.load(folder / "README.md" if (folder / "README.md").is_file() else checkpoint)
        prompts = [entry["text"] for entry in card.data.get("widget") or [] if "text" in entry]
    except Exception:  # cards are written by people, and may be missing or hold anything
        prompts = []
    return prompts or EXAMPLES


def lay_out(pipe: DiffusionPipeline, examples: list, name: str, queue_size: int = QUEUE_SIZE) -> gr.Blocks:
    """Lay out the app and connect its events.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): The pipeline that generates the images.
        examples (`list`): Prompts or class ids to choose from.
        name (`str`): The checkpoint's name, which everyone can read.
        queue_size (`int`, *optional*, defaults to 40): Requests that may wait.
    """
    studio, is_text = Studio(pipe), pipe.condition_kind == "text"
    class_names = [] if is_text else pipe.class_names(list(range(pipe.num_classes)))
    hidden = {"show_progress": "hidden", "api_visibility": "private"}

    def ask() -> gr.components.Component:
        if is_text:
            return gr.Textbox(
                label="Prompt", placeholder="Describe an image", lines=1, max_lines=3, max_length=MAX_PROMPT,
                elem_classes="ask",
            )  # fmt: skip
        if any(name != str(index) for index, name in enumerate(class_names)):
            choices = [(f"{name} ({index})", index) for index, name in enumerate(class_names)]
            return gr.Dropdown(choices, value=0, label="Class", filterable=True, elem_classes="ask")
        return gr.Number(0, label="Class", precision=0, minimum=0, maximum=pipe.num_classes - 1, elem_classes="ask")

    def settings(named: list[str]) -> list[gr.components.Component]:
        """The components of a tab that set what `named` names."""
        values, made = {"num_candidates": 1} | pipe.sampling_settings(), {}

        def sliders(ranges: dict) -> None:
            names = [name for name in ranges if name in named]
            for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
                with gr.Row():
                    for name in pair:
                        label, low, high, step, info = ranges[name]
                        high = max(pipe.codebook_size if name == "top_k" else high, values[name])
                        made[name] = gr.Slider(
                            low, high, values[name], step=step, label=label, info=info, min_width=140
                        )

        with gr.Accordion("Settings", open=False):
            with gr.Row():
                # No gr.Number: an empty one turns into 0. The value is a default for clients of the API.
                made["seed"] = gr.Textbox("", label="Seed", placeholder="random", max_length=16, min_width=100)
                made["count"] = gr.Slider(1, MAX_COUNT, 1, step=1, label="Images", min_width=100)
            sliders(SLIDERS)
            sliders(PRIOR_SLIDERS)
            sliders(UPSAMPLING_SLIDERS)
            sliders(CANDIDATES_SLIDERS)
            # Where no rows are drawn, each step of diffusion is one.
            first = PREVIEWS[0] if pipe.grid_size is not None else "every step"
            made["preview"] = gr.Radio([first, *PREVIEWS[1:]], value=first, label="Preview")
        return [made[name] for name in named]

    def connect(triggers, examples, stop, go, function, inputs, outputs) -> None:
        """Run `function` on the triggers and after an example; buttons and status show what is going on meanwhile."""
        buttons = [go, stop, outputs[1]]
        on, off = gr.update(interactive=True), gr.update(interactive=False)

        def busy():
            return off, on, "Waiting ..."

        def idle(text=None):
            return on, off, gr.skip() if text is None else text

        started = [gr.on(triggers, busy, None, buttons, queue=False, **hidden)]
        if examples is not None:
            started.append(examples.load_input_event.then(busy, None, buttons, queue=False, **hidden))
        runs = []
        for event in started:
            run = event.then(
                function, inputs, outputs, show_progress="hidden", concurrency_id="draw", concurrency_limit=1,
                api_name=function.__name__, api_visibility="private" if runs else "public",
            )  # fmt: skip
            # Both, since the browser does not call `then` after an error.
            run.success(idle, None, buttons, queue=False, **hidden)
            # A cancelled generation fails too, before or after the stop button's own event.
            run.failure(partial(idle, "Stopped."), None, buttons, queue=False, **hidden)
            runs.append(run)
        stop.click(partial(idle, "Stopped."), None, buttons, queue=False, cancels=runs, **hidden)

    def tab(label: str, function, takes_image: bool = False, completes: bool = False) -> None:
        """A tab with inputs, images and settings. An image that it takes is completed, or stands for the prompt."""
        with gr.Tab(label), gr.Row(elem_classes="bench"):
            given, triggers, samples, asks = [], [], None, completes or not takes_image
            with gr.Column(elem_classes="asks"):
                if takes_image:
                    image = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"], height=220)
                    # The file as it was uploaded: the event opens it, so that it can say what is wrong with it.
                    image.preprocess = lambda payload: payload and payload.path
                    given = [image]
                if completes:
                    rows = gr.Slider(
                        0, pipe.grid_size - 1, pipe.grid_size // 2, step=1, label="Rows to keep",
                        info=f"From the top, of {pipe.grid_size}.",
                    )  # fmt: skip
                    given = [image, rows]
                if asks:
                    condition = ask()
                    triggers = [condition.submit] if is_text else []
                with gr.Row(elem_classes="go"):
                    go, stop = gr.Button("Draw", variant="primary"), gr.Button("Stop", interactive=False)
            with gr.Column(elem_classes="shows"):
                gallery = gr.Gallery(
                    show_label=False, columns=1, object_fit="contain", format="png", interactive=False,
                    buttons=["download", "fullscreen"], elem_classes="easel", height=None,
                )  # fmt: skip
                with gr.Row(elem_classes="below"):
                    status = gr.Markdown("", elem_classes="status")
                    share = gr.DownloadButton("Save PNG", size="sm", interactive=False, elem_classes="share")
            with gr.Column(elem_classes="more"):
                if not takes_image:
                    samples = gr.Examples(
                        [[value] for value in examples], condition, label="Examples", cache_examples=False,
                        example_labels=[str(value) if is_text else class_names[value] for value in examples],
                    )  # fmt: skip
                named = studio.names + (studio.prior_names if asks else [])
                chosen = settings(named)
                with gr.Accordion("Parameters", open=False):
                    parameters = gr.Code(language="json", show_label=False, interactive=False, max_lines=18)
            if completes:
                gr.on([image.change, rows.release], studio.keep, given, [gallery, status], **hidden)
            inputs, outputs = [*given, *([condition] if asks else []), *chosen], [gallery, status, parameters, share]
            names = ["image"] * takes_image + ["keep_rows"] * completes + ["condition"] * asks + named
            connect([go.click, *triggers], samples, stop, go, with_names(function, names), inputs, outputs)

    with gr.Blocks(title=f"llamagen: {name}", delete_cache=(600, 3600), analytics_enabled=False) as demo:
        gr.Markdown(f"# llamagen\n\n**{name}**: {find_family(type(pipe).__name__).summary.format(pipe=pipe)}")
        with gr.Tabs():
            tab("Text" if is_text else "Class", studio.draw)
            if pipe.grid_size is not None:
                tab("Complete", studio.complete, takes_image=True, completes=True)
            if pipe.varies_images:
                tab("Variations", studio.vary, takes_image=True)
    return demo.queue(max_size=queue_size, default_concurrency_limit=1)


def with_names(function: Callable, names: list[str]) -> Callable:
    """An event whose parameters have names, by which clients of the API pass them."""

    @wraps(function)
    def event(*values):
        yield from function(*values)

    event.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    return event
