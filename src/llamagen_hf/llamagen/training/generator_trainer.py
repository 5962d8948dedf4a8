"""Training of the generator: the next code, given a condition and the codes before it."""

from collections.abc import Iterable
from functools import partial
from itertools import chain

import torch
from datasets import Dataset
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn

from ...autoencoders import load_vq_model
from ...conditioning.text import encode_tokens, tokenize_prompts
from ...data.fingerprint import Inputs, fingerprint_checkpoint, fingerprint_components, vq_model_fingerprint
from ...data.loader import StepLoader, batches_once
from ...files import replace_result
from ...loading.checkpoint import is_shipped, shipped_folder
from ...loading.lora import lora_config
from ...local_paths import unless_folder
from ...training.record import read_facts, training_facts
from ...training.sharding import state_of_part, unsharded
from ...training.single_model import SingleModelTask, parameter_groups
from ...training.text_encoder import pretrain_text_encoder
from ...training.trainer import Trainer
from ..pipeline import AutoregressiveImagePipeline
from ..vq_model import LlamaGenVQModel
from .codes import CodeCollator, CodeSamples, find_codes, load_codes, read_codes_info, stored_dim
from .generator_config import GeneratorTrainingConfig
from .generator_models import ConditionToCodes, build_models, flops_per_image, mean_loss


SAMPLES = 8


def train_generator(config: GeneratorTrainingConfig) -> dict[str, float]:
    """Train the generator, resuming from the newest checkpoint of `config.output_dir`.

    The pipeline is saved to `config.output_dir`, or the adapter alone if `config.lora_rank` is set.

    Returns:
        `dict[str, float]`: `test_loss` of the averaged weights in nats per code, and `test_loss_without_condition`;
        the larger their difference, the more the model reads in its condition. Empty if there is no test split.

    Raises:
        ValueError: Recipe, codes and models do not fit each other.
    """
    return Trainer(config, GeneratorTask(config)).fit()


class GeneratorTask(SingleModelTask):
    """The training of a generator, for [`~llamagen_hf.training.trainer.Trainer`]."""

    results = (AutoregressiveImagePipeline.config_name, "adapter_config.json")
    compiles_by_default = True

    def __init__(self, config: GeneratorTrainingConfig):
        self.config = config
        self.max_bad_rows = config.max_bad_rows

    def load(self) -> None:
        config, device = self.config, self.trainer.device
        self.vq_model = load_vq_model(config.vq_model).to(device)
        self.codes_info, fingerprint = read_codes_info(config.codes_dir), vq_model_fingerprint(self.vq_model)
        self.train, self.test = (load_codes(config.codes_dir, split, fingerprint) for split in ("train", "test"))
        models = build_models(config, self.train, self.codes_info)
        self.transformer, self.text_encoder, self.tokenizer, self.text_encoder_is_new = models
        self.encoder_learns = not config.lora_rank and (self.text_encoder_is_new or config.train_text_encoder)
        if self.text_encoder is not None:
            self.text_encoder.to(device).requires_grad_(self.encoder_learns).train(self.encoder_learns)
        text, tokenize = self.transformer.config, None
        if self.tokenizer is not None:
            tokenize = partial(
                tokenize_prompts, self.tokenizer, length=text.condition_length, cleaning=text.prompt_cleaning
            )
        dim = stored_dim(self.codes_info, config.caption_templates) if config.stored_states else None
        self.collate = CodeCollator(tokenize, text.condition_length, dim)

    def inputs(self) -> Inputs:
        """The codes, and the weights that are not new."""
        components = {}
        if self.config.init_from is not None:
            components["init_from"] = self.transformer
        if not self.text_encoder_is_new:
            components |= {"text_encoder": self.text_encoder, "tokenizer": self.tokenizer}
        codes = fingerprint_checkpoint(find_codes(self.config.codes_dir), "*.parquet")
        return {"the codes": codes} | fingerprint_components(components)

    def step_loader(self) -> StepLoader:
        samples = self.samples(self.train, training=True)
        return self.trainer.step_loader(self.train.select_columns(samples.columns), samples, self.collate)

    def pretrain(self, steps: Iterable[list[dict]]) -> None:
        config = self.config
        if self.text_encoder_is_new and config.text_pretrain_steps:
            batches, rate = chain.from_iterable(steps), config.text_pretrain_learning_rate
            count, vectors = config.text_pretrain_steps, partial(codebook_vectors, self.vq_model)
            with self.trainer.accelerator.autocast():
                pretrain_text_encoder(self.text_encoder, batches, vectors, count, rate)

    def prepare(self) -> tuple[nn.Module, list]:
        config = self.config
        self.transformer.config.condition_dropout = config.condition_dropout
        if config.lora_rank:
            self.transformer.add_adapter(lora_config(config.lora_rank, config.lora_alpha))
        elif config.conditioning == "text" and not config.condition_dropout:
            self.transformer.model.uncond_embedding.requires_grad_(False)  # nothing would train it
        if config.gradient_checkpointing:
            self.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        device = self.trainer.device
        if device.type == "cpu":  # the backward pass of SDPA is slower there at these lengths
            self.transformer.set_attn_implementation("eager")
        self.flops_per_sample = flops_per_image(self.transformer)
        text_encoder = self.text_encoder if self.encoder_learns else None
        model = ConditionToCodes(self.transformer, text_encoder, config.code_noise).train()
        if self.trainer.compiles:
            self.compile(model)
        groups = parameter_groups(model, config.learning_rate, config.text_learning_rate, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.adam_beta1, config.adam_beta2), fused=True)
        self.model, self.optimizer = self.trainer.accelerator.prepare(model, optimizer)
        self.scheduler = self.trainer.scheduler(self.optimizer)
        return self.trainer.accelerator.unwrap_model(self.model), [self.scheduler]

    def compile(self, model: ConditionToCodes) -> None:
        """Compile the whole step, or layer by layer where the layers have hooks around them."""
        if self.trainer.is_sharded or self.config.gradient_checkpointing:
            for layer in self.transformer.model.layers:
                layer.compile()
        else:
            model.compile_training()

    def samples(self, rows: Dataset, training: bool) -> CodeSamples:
        config = self.config
        if config.conditioning == "class":
            classes = self.transformer.config.num_classes
            return CodeSamples(rows, label_column=config.label_column, num_classes=classes, training=training)
        return CodeSamples(
            rows,
            config.caption_templates,
            stored_states=config.stored_states,
            prompt_cleaning=self.transformer.config.prompt_cleaning,
            training=training,
        )

    def encode(self, batch: dict) -> dict:
        """The batch, with text states in place of tokens where the text encoder is not trained."""
        if "input_ids" not in batch or self.encoder_learns:
            return batch
        batch = dict(batch)
        tokens = (batch.pop("input_ids"), batch.pop("attention_mask"))
        with torch.no_grad(), self.trainer.accelerator.autocast():
            states, mask = encode_tokens(self.text_encoder, *tokens, self.transformer.config.condition_length)
        return batch | {"prompt_embeds": states, "prompt_attention_mask": mask}

    def log_values(self, samples_per_second: float) -> dict[str, float]:
        return {"tokens/s": samples_per_second * self.transformer.config.num_codes}

    def measure(self) -> dict[str, float]:
        values, device = {}, self.trainer.device
        for name in ("test_loss", "test_loss_without_condition") if self.test is not None else ():
            batches = self.trainer.batches_once(self.test, self.samples(self.test, training=False), self.collate)
            batches = (self.encode({key: value.to(device) for key, value in batch.items()}) for batch in batches)
            loss, rows = mean_loss(self.model, batches, without_condition=name != "test_loss")
            total = self.trainer.accelerator.reduce(torch.tensor([loss * rows, rows], device=device))
            values[name] = (total[0] / total[1]).item()
        return values

    def sample_condition(self) -> dict:
        """The conditions of the images in samples/, as arguments of the pipeline."""
        prompts = self.config.sample_prompts
        if prompts is not None:
            return {"class_labels" if self.config.conditioning == "class" else "prompt": prompts}
        rows = self.train if self.test is None else self.test
        samples = next(batches_once(rows, self.samples(rows, training=False), list, SAMPLES))
        if "label" in samples[0]:
            return {"class_labels": [sample["label"] for sample in samples]}
        if "caption" in samples[0]:
            return {"prompt": [sample["caption"] for sample in samples]}
        condition = self.collate(samples)
        del condition["codes"]
        return condition

    def draw_samples(self) -> Image.Image:
        """Images of `sample_prompts`, or of the first rows' conditions, with the seeds 0, 1, 2, ..."""
        pipe = AutoregressiveImagePipeline(self.vq_model, self.transformer, self.text_encoder, self.tokenizer)
        pipe.set_progress_bar_config(disable=True)
        condition = self.sample_condition()
        count = len(next(iter(condition.values())))
        seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
        images = pipe(**condition, generator=seeds, **self.config.sampling_defaults).images
        return make_image_grid(images, 1, count)

    def save(self) -> None:
        """Save the adapter, or the whole pipeline."""
        accelerator, output_dir = self.trainer.accelerator, self.trainer.output_dir
        state = accelerator.get_state_dict(self.model) if self.trainer.is_sharded else None
        if not accelerator.is_main_process:
            return
        transformer, text_encoder = self.transformer, self.text_encoder
        if self.config.lora_rank:
            (adapter,) = self.transformer.peft_config.values()
            base = self.config.init_from
            adapter.base_model_name_or_path = base if is_shipped(base) else unless_folder(base)
            whole = None if state is None else state_of_part(state, "transformer.")
            replace_result(output_dir, "adapter_config.json", partial(transformer.save_pretrained, state_dict=whole))
            return
        if state is not None:
            transformer = unsharded(transformer, state_of_part(state, "transformer."))
            if self.encoder_learns:
                text_encoder = unsharded(text_encoder, state_of_part(state, "text_encoder."))
        pipe = AutoregressiveImagePipeline(
            self.vq_model, transformer, text_encoder, self.tokenizer, self.config.sampling_defaults or None
        )
        replace_result(output_dir, pipe.config_name, pipe.save_pretrained)

    def facts(self, metrics: dict[str, float]) -> dict:
        """Data, image tokenizer, codes and this training, and conditions that suit the model."""
        vq_model, condition = self.config.vq_model, self.sample_condition()
        codes = {name: self.codes_info[name] for name in ("rows", "crops", "num_crops", "crop_ranges")}
        return read_facts(shipped_folder(vq_model) or vq_model) | {
            "codes": codes,
            "generator": training_facts(self.config, metrics),
            "examples": condition.get("prompt") or condition.get("class_labels") or [],
        }


def codebook_vectors(vq_model: LlamaGenVQModel, batch: dict) -> torch.Tensor:
    """The codebook vectors of each image's codes, in raster order: `(batch, codes * vq_embed_dim)`."""
    return vq_model.lookup(batch["codes"]).flatten(1)
