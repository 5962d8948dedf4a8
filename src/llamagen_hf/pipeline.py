"""`AutoregressiveImagePipeline`: a prompt or a class in, pictures out."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .class_labels import resolve_class_label
from .decoding import CodeDecoder
from .lora import LoraLoaderMixin
from .modeling import LlamaGenForConditionalGeneration
from .prompts import encode_tokens, tokenize_prompts
from .sampling import check_sampling, draw_uniforms
from .vq_model import LlamaGenVQModel
from .weights import find_missing_weights, read_weight_names


EMOJI_CHECKPOINT = Path(__file__).parent / "checkpoints" / "emoji"

# Where neither the call nor the checkpoint says otherwise.
SAMPLING_DEFAULTS = {"guidance_scale": 4.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


class AutoregressiveImagePipeline(LoraLoaderMixin, DiffusionPipeline):
    r"""Draws images with LlamaGen (arXiv 2406.06525): a Llama writes codes, a decoder turns them into pixels.

    It has the loading, saving, device and offloading methods of any [`~diffusers.DiffusionPipeline`].

    Args:
        vq_model ([`LlamaGenVQModel`]): Turns codes into images.
        transformer ([`LlamaGenForConditionalGeneration`]): Draws the codes.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*): Any encoder, for text-conditional checkpoints.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The text encoder's.
        sampling_defaults (`dict`, *optional*): What `__call__` uses where it is not told otherwise:
            `guidance_scale`, `temperature`, `top_k`, `top_p`. Saved with the checkpoint.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf import AutoregressiveImagePipeline

    >>> pipe = AutoregressiveImagePipeline.from_pretrained()  # the emoji checkpoint that ships with the package
    >>> image = pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0]
    >>> image.size
    (64, 64)
    ```
    """

    model_cpu_offload_seq = "text_encoder->transformer->vq_model"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["codes"]

    def __init__(
        self,
        vq_model: LlamaGenVQModel,
        transformer: LlamaGenForConditionalGeneration,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sampling_defaults: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            vq_model=vq_model, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer
        )
        if vq_model.config.num_vq_embeddings != transformer.config.vocab_size:
            raise ValueError(
                f"The transformer draws {transformer.config.vocab_size} codes, but the tokenizer has "
                f"{vq_model.config.num_vq_embeddings}; they do not belong together."
            )
        if text_encoder is not None and text_encoder.config.hidden_size != transformer.config.condition_dim:
            raise ValueError(
                f"The text encoder's states are {text_encoder.config.hidden_size} wide, but the transformer takes "
                f"{transformer.config.condition_dim}; they do not belong together."
            )
        if unknown := set(sampling_defaults or {}) - set(SAMPLING_DEFAULTS):
            raise ValueError(f"`sampling_defaults` has {sorted(unknown)}; it may have {list(SAMPLING_DEFAULTS)}.")
        self.register_to_config(sampling_defaults=sampling_defaults)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vq_model.downsample_factor)
        self._decoder = CodeDecoder(transformer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, **kwargs):
        """Load a checkpoint from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
                A folder or a Hub id; the emoji checkpoint that ships with the package by default.
            kwargs: As for [`~diffusers.DiffusionPipeline.from_pretrained`]. Weights load as float32 unless `dtype`
                says otherwise.

        Raises:
            OSError: In one sentence, if there is no such checkpoint, or if its weights are damaged or incomplete.
        """
        path = EMOJI_CHECKPOINT if pretrained_model_name_or_path is None else pretrained_model_name_or_path
        folder = cls.find_checkpoint(path, **kwargs)
        kwargs["dtype"] = kwargs.get("dtype", kwargs.pop("torch_dtype", torch.float32))
        saved_names = read_weight_names(folder)
        pipe = super().from_pretrained(folder, **kwargs)
        for name, component in pipe.components.items():
            if name in saved_names and name not in kwargs and component is not None:
                if missing := find_missing_weights(component, saved_names[name]):
                    raise OSError(f"The weights of {name} in {str(path)!r} miss {', '.join(missing)}.")
        # Saving would publish this path, of interest on this machine only.
        pipe.register_to_config(_name_or_path=None if Path(path).is_dir() else str(path))
        pipe.vq_model.register_to_config(_name_or_path=None)
        return pipe

    @classmethod
    def find_checkpoint(cls, pretrained_model_name_or_path=None, **kwargs) -> Path:
        """The folder of a checkpoint, fetched if need be; arguments and errors as for [`from_pretrained`]."""
        path = EMOJI_CHECKPOINT if pretrained_model_name_or_path is None else pretrained_model_name_or_path
        folder = Path(path if Path(path).is_dir() else cls.download(path, **kwargs))
        if not (folder / cls.config_name).is_file():
            raise OSError(f"{str(path)!r} is no checkpoint: it has no {cls.config_name}.")
        return folder

    @classmethod
    def download(cls, pretrained_model_name, **kwargs) -> str:
        """Fetch a checkpoint from the Hub into the cache and return its folder.

        The base class looks up which Python files a repository must hold to define components that are not its own.
        Ours are in this package, so the files of the repository are all there is to fetch.
        """
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        try:
            return snapshot_download(str(pretrained_model_name), ignore_patterns=["*.md", "*.png"], **options)
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise OSError(f"There is no folder and no repository {str(pretrained_model_name)!r}.") from error
        except LocalEntryNotFoundError as error:
            raise OSError(
                f"There is no folder {str(pretrained_model_name)!r}, and as a repository it is neither in the cache "
                "nor can the Hub be reached."
            ) from error

    @property
    def is_text_conditional(self) -> bool:
        """Whether the checkpoint draws from prompts; else it draws from classes."""
        return self.transformer.config.conditioning == "text"

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.transformer.config.grid_size * self.vq_model.downsample_factor

    def sampling_settings(self, **given: float | None) -> dict[str, float]:
        """What a call with these settings draws with: `None` means the checkpoint's default, else the library's."""
        settings = SAMPLING_DEFAULTS | (self.config.sampling_defaults or {})
        return settings | {name: value for name, value in given.items() if value is not None}

    def compile_step(self, **kwargs) -> None:
        """Compile the drawing of one code, see [`~llamagen_hf.decoding.CodeDecoder.compile`].

        Call it last, when weights, dtype and device are set. The first image then takes a minute or so to compile.
        """
        self.decoder.compile(**kwargs)

    @property
    def decoder(self) -> CodeDecoder:
        """The token loop around the current `transformer`."""
        if self._decoder.model is not self.transformer:
            self._decoder = CodeDecoder(self.transformer)
        return self._decoder

    def check_inputs(
        self,
        prompt,
        class_labels,
        prompt_embeds,
        prompt_attention_mask,
        num_images_per_prompt,
        output_type,
        height,
        width,
        callback_on_step_end_tensor_inputs,
    ) -> None:
        """Raise a `ValueError` of one sentence if the arguments of a call do not fit each other or the checkpoint."""
        config = self.transformer.config
        given = [
            name
            for name, value in {
                "prompt": prompt,
                "class_labels": class_labels,
                "prompt_embeds": prompt_embeds,
            }.items()
            if value is not None
        ]
        if len(given) != 1:
            found = " and ".join(f"`{name}`" for name in given) or "none of them"
            raise ValueError(f"Pass exactly one of `prompt`, `class_labels` and `prompt_embeds`; found {found}.")
        if self.is_text_conditional and class_labels is not None:
            raise ValueError("This checkpoint is text-conditional: pass `prompt`, not `class_labels`.")
        if not self.is_text_conditional and class_labels is None:
            raise ValueError(f"This checkpoint is class-conditional: pass `class_labels`, not `{given[0]}`.")
        if prompt is not None:
            if not isinstance(prompt, str) and not (
                isinstance(prompt, list) and all(isinstance(text, str) for text in prompt)
            ):
                raise ValueError(f"`prompt` must be a string or a list of strings, not {type(prompt).__name__}.")
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError(
                    "This pipeline has no text encoder and tokenizer: load them with it, or pass `prompt_embeds`."
                )
        if isinstance(prompt, list) and not prompt:
            raise ValueError("`prompt` is an empty list; pass at least one prompt.")
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.flatten().tolist()
        if class_labels is not None:
            labels = class_labels if isinstance(class_labels, list) else [class_labels]
            if not all(isinstance(label, (int, str)) and not isinstance(label, bool) for label in labels):
                raise ValueError(f"`class_labels` must be class ids or names, not {class_labels!r}.")
        if isinstance(class_labels, list) and not class_labels:
            raise ValueError("`class_labels` is an empty list; pass at least one class.")
        if prompt_embeds is not None:
            expected = (config.condition_length, config.condition_dim)
            if not isinstance(prompt_embeds, torch.Tensor):
                raise ValueError(f"`prompt_embeds` must be a tensor, not {type(prompt_embeds).__name__}.")
            if prompt_embeds.ndim != 3 or tuple(prompt_embeds.shape[1:]) != expected or len(prompt_embeds) == 0:
                raise ValueError(
                    f"`prompt_embeds` has shape {tuple(prompt_embeds.shape)}; "
                    f"expected (batch, {expected[0]}, {expected[1]})."
                )
        if prompt_attention_mask is not None:
            if prompt_embeds is None:
                raise ValueError("`prompt_attention_mask` goes with `prompt_embeds`, which is missing.")
            if prompt_attention_mask.shape != prompt_embeds.shape[:2]:
                raise ValueError(
                    f"`prompt_attention_mask` has shape {tuple(prompt_attention_mask.shape)}; "
                    f"expected {tuple(prompt_embeds.shape[:2])}."
                )
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` is {num_images_per_prompt}; expected an integer of at least 1.")
        if output_type not in ("pil", "np", "pt", "codes"):
            raise ValueError(f"`output_type` is {output_type!r}; expected 'pil', 'np', 'pt' or 'codes'.")
        for name, side in (("height", height), ("width", width)):
            if side is not None and side != self.image_size:
                raise ValueError(
                    f"`{name}` is {side}; this checkpoint draws {self.image_size}x{self.image_size} pixels only."
                )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` names {sorted(unknown)}; there is only "
                f"{self._callback_tensor_inputs}."
            )

    def get_class_ids(self, class_labels: int | str | list[int | str] | torch.Tensor) -> torch.LongTensor:
        """Input ids `(batch,)` of classes given by id or by name; a `ValueError` names one that does not exist."""
        config = self.transformer.config
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.flatten().tolist()
        labels = [class_labels] if isinstance(class_labels, (int, str)) else class_labels
        ids = [resolve_class_label(label, config.num_classes, config.id2label) for label in labels]
        return config.vocab_size + torch.tensor(ids)

    def encode_prompt(self, prompt: str | list[str]) -> tuple[torch.Tensor, torch.LongTensor]:
        """Clean, tokenize and encode prompts.

        Returns:
            What `__call__` takes as `prompt_embeds` `(batch, condition_length, condition_dim)` and
            `prompt_attention_mask` `(batch, condition_length)`. Padding is on the left and zero; long prompts are cut.
        """
        length = self.transformer.config.condition_length
        input_ids, mask = tokenize_prompts(self.tokenizer, [prompt] if isinstance(prompt, str) else prompt, length)
        device = self._execution_device
        with torch.no_grad():
            return encode_tokens(self.text_encoder, input_ids.to(device), mask.to(device), length)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: int = -1,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["codes"],  # noqa: B006 (diffusers' signature, never changed)
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""Draw images.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw, for text-conditional checkpoints.
            class_labels (`int`, `str` or a list of them, *optional*):
                Classes by id or by name, for class-conditional checkpoints.
            guidance_scale (`float`, *optional*):
                Strength of classifier-free guidance on the logits, at least 0. 1 turns it off and halves the work.
                The checkpoint's `sampling_defaults` apply to this and the next three, then 4.0, 1.0, 0 and 1.0.
            guidance_interval (`int`, *optional*, defaults to -1):
                n guides the first n + 2 codes only, as the released `cfg_interval` does; -1 guides all.
            temperature (`float`, *optional*): Divides the logits, at least 0; 0 takes the likeliest code.
            top_k (`int`, *optional*): Number of codes to draw from; 0 means all.
            top_p (`float`, *optional*): Probability mass to draw from, in [0, 1]; 1 means all.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images for each prompt or class.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the draws. With one per image, an image does not depend on the rest of the batch.
            prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                Text states instead of `prompt`, padded on the left, see [`encode_prompt`].
            prompt_attention_mask (`torch.Tensor` of shape `(batch, condition_length)`, *optional*):
                1 for words, 0 for padding; all words by default.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`; `"np"` `(batch, height, width, 3)` or `"pt"` `(batch, 3, height, width)` in [0, 1]; or
                `"codes"`, the grid itself, `(batch, grid_size, grid_size)` long.
            return_dict (`bool`, *optional*, defaults to `True`): Else a tuple of one element.
            callback_on_step_end (`Callable`, *optional*):
                Called after each code as `callback(pipe, step, step, {"codes": codes})` with the `(batch, step + 1)`
                codes so far; a dict with changed `"codes"` may be returned.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["codes"]`):
                What the callback's dict holds.
            height, width (`int`, *optional*): Only [`image_size`], the one size that a checkpoint draws.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: The images, prompt by prompt.

        Raises:
            ValueError: In one sentence, if an argument does not fit.
        """
        self.check_inputs(
            prompt,
            class_labels,
            prompt_embeds,
            prompt_attention_mask,
            num_images_per_prompt,
            output_type,
            height,
            width,
            callback_on_step_end_tensor_inputs,
        )
        settings = self.sampling_settings(
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        check_sampling(**settings)

        device, config = self._execution_device, self.transformer.config
        condition = {}
        if self.is_text_conditional:
            if prompt_embeds is None:
                prompt_embeds, prompt_attention_mask = self.encode_prompt(prompt)
            elif prompt_attention_mask is None:
                prompt_attention_mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long)
            condition["prompt_embeds"] = prompt_embeds.to(device, self.transformer.dtype)
            condition["prompt_attention_mask"] = prompt_attention_mask.to(device, torch.long)
        else:
            condition["class_ids"] = self.get_class_ids(class_labels).to(device)
        condition = {name: value.repeat_interleave(num_images_per_prompt, 0) for name, value in condition.items()}
        batch_size = len(next(iter(condition.values())))
        if not isinstance(generator, (torch.Generator, list, type(None))):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, not {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {batch_size} images are to be drawn.")

        with self.progress_bar(total=config.num_codes) as progress_bar:

            def on_code(step: int, codes: torch.LongTensor) -> torch.LongTensor | None:
                progress_bar.update()
                if callback_on_step_end is None:
                    return None
                tensors = {name: codes for name in callback_on_step_end_tensor_inputs}
                return (callback_on_step_end(self, step, step, tensors) or {}).get("codes")

            codes = self.decoder(
                draw_uniforms(batch_size, config.num_codes, generator, device),
                **condition,
                **settings,
                callback=on_code,
            )
        codes = codes.view(batch_size, config.grid_size, config.grid_size)
        images = codes
        if output_type != "codes":
            images = self.image_processor.postprocess(self.vq_model.decode_codes(codes), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


# Saved pipelines name the module of a class. The package itself stays where it is, whatever moves within it.
AutoregressiveImagePipeline.__module__ = "llamagen_hf"
