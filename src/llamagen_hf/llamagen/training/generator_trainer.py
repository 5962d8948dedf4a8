"""Training of the generator: the next code, given a condition and the codes before it."""

from functools import partial

import torch
from datasets import Dataset
from diffusers.optimization import get_scheduler
from PIL import Image
from transformers import PreTrainedModel

from ...autoencoders import load_tokenizer
from ...conditioning.text import encode_tokens, tokenize_prompts
from ...data.fingerprint import (
    Inputs,
    fingerprint_checkpoint,
    fingerprint_components,
    tokenizer_fingerprint,
)
from ...data.loader import batches_once
from ...files import replace_result
from ...loading.checkpoint import EMOJI_CHECKPOINT, is_shipped
from ...loading.lora import lora_config
from ...local_paths import unless_folder
from ...processes import on_main_process
from ...training.checkpoints import latest_checkpoint
from ...training.record import read_facts, training_facts
from ...training.trainer import Run, side_by_side, train_with_memory_at_hand
from ..pipeline import AutoregressiveImagePipeline
from .codes import CodeCollator, CodeSamples, find_codes, load_codes, read_codes_info
from .condition_to_codes import ConditionToCodes, mean_loss, parameter_groups
from .generator_config import GeneratorTrainingConfig
from .generator_parts import GeneratorParts, build_parts
from .text_encoder import pretrain_text_encoder
from .throughput import flops_per_image, peak_flops


SAMPLES = 8


def train_generator(config: GeneratorTrainingConfig) -> dict[str, float]:
    """Train the generator, resuming from the newest checkpoint of `config.output_dir`.

    The pipeline is saved to `config.output_dir`, or the adapter alone if `config.lora_rank` is set.

    Returns:
        `dict[str, float]`: `test_loss` of the averaged weights in nats a code, and `test_loss_without_condition`,
        which is the larger the more the model listens to its condition. Empty if there is no test split.

    Raises:
        ValueError: If recipe, codes and models do not fit each other.
    """
    return train_with_memory_at_hand(
        config, lambda micro_batch_size: GeneratorTraining(config, micro_batch_size).run()
    )


class GeneratorTraining:
    """What a [`Run`] does with the generator: its steps, measurements, images and result."""

    def __init__(self, config: GeneratorTrainingConfig, micro_batch_size: int | None):
        self.config = config
        self.training = training = Run(config, micro_batch_size, config.max_bad_rows)
        self.accelerator, self.device = training.accelerator, training.accelerator.device
        self.vq_model = load_tokenizer(config.tokenizer).to(self.device)
        fingerprint, info = tokenizer_fingerprint(self.vq_model), read_codes_info(config.codes_dir)
        self.train, self.test = (load_codes(config.codes_dir, split, fingerprint) for split in ("train", "test"))

        parts = build_parts(config, self.train, info)
        inputs = on_main_process(lambda: self.inputs(parts))  # before an adapter is added
        self.transformer, self.text_encoder, self.tokenizer = parts.transformer, parts.text_encoder, parts.tokenizer
        self.transformer.config.condition_dropout = config.condition_dropout
        self.encoder_learns = not config.lora_rank and (parts.text_encoder_is_new or config.train_text_encoder)
        if self.text_encoder is not None:
            self.text_encoder.to(self.device).requires_grad_(self.encoder_learns).train(self.encoder_learns)
        if config.lora_rank:
            self.transformer.add_adapter(lora_config(config.lora_rank, config.lora_alpha))
        elif config.conditioning == "text" and not config.condition_dropout:
            self.transformer.model.uncond_embedding.requires_grad_(False)  # nothing would train it
        model = ConditionToCodes(self.transformer, self.text_encoder if self.encoder_learns else None).train()

        tokenize = None
        if self.tokenizer is not None:
            text = self.transformer.config
            tokenize = partial(
                tokenize_prompts, self.tokenizer, length=text.condition_length, cleaning=text.prompt_cleaning
            )
        self.collate = CodeCollator(tokenize, self.transformer.config.condition_length, info.get("text_dim"))
        samples = self.samples(self.train, training=True)
        self.feed = training.feed(self.train.select_columns(samples.columns), samples, self.collate)
        training.begin(lambda: inputs, [AutoregressiveImagePipeline.config_name, "adapter_config.json"])
        if parts.text_encoder_is_new and config.text_pretrain_steps and not latest_checkpoint(training.checkpoints):
            batches = (batch for micro_batches in self.feed for batch in micro_batches)
            rate = config.text_pretrain_learning_rate
            pretrain_text_encoder(self.text_encoder, batches, self.vq_model, config.text_pretrain_steps, rate)
            self.feed.restart()

        if config.gradient_checkpointing:
            self.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            for layer in self.transformer.model.layers:
                layer.compile()
        self.flops_per_image = flops_per_image(self.transformer)
        groups = parameter_groups(model, config.learning_rate, config.text_learning_rate, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.adam_beta1, config.adam_beta2))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        training.set_length(self.feed)
        self.scheduler = get_scheduler(
            config.lr_scheduler, self.optimizer, None, config.lr_warmup_steps, training.last_step
        )
        training.start(self.accelerator.unwrap_model(self.model), self.scheduler)

    def inputs(self, parts: GeneratorParts) -> Inputs:
        """What the training reads: codes, and the weights that are not new."""
        components = {}
        if self.config.init_from is not None:
            components["init_from"] = parts.transformer
        if not parts.text_encoder_is_new:
            components |= {"text_encoder": parts.text_encoder, "tokenizer": parts.tokenizer}
        codes = fingerprint_checkpoint(find_codes(self.config.codes_dir), "*.parquet")
        return {"the codes": codes} | fingerprint_components(components)

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

    def run(self) -> dict[str, float]:
        self.training.train(self)
        return self.training.finish(self)

    def train_step(self, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        losses = []
        for batch in micro_batches:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**self.encode(batch))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        rate = losses[0].new_tensor(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        return {"loss": torch.stack(losses).mean(), "learning_rate": rate}

    def encode(self, batch: dict) -> dict:
        """The batch, with text states in place of tokens where the text encoder does not learn along."""
        if "input_ids" not in batch or self.encoder_learns:
            return batch
        batch = dict(batch)
        tokens = (batch.pop("input_ids"), batch.pop("attention_mask"))
        with torch.no_grad(), self.accelerator.autocast():
            states, mask = encode_tokens(self.text_encoder, *tokens, self.transformer.config.condition_length)
        return batch | {"prompt_embeds": states, "prompt_attention_mask": mask}

    def measure(self) -> dict[str, float]:
        if self.test is None:
            return {}
        # All processes of a sharded model must take the same number of steps, so each of them takes all.
        split = (
            (0, 1) if self.training.is_sharded else (self.accelerator.process_index, self.accelerator.num_processes)
        )
        values = {}
        for name, without in (("test_loss", False), ("test_loss_without_condition", True)):
            samples = self.samples(self.test, training=False)
            batches = batches_once(self.test, samples, self.collate, self.training.micro_batch_size, *split)
            batches = (self.encode({key: value.to(self.device) for key, value in batch.items()}) for batch in batches)
            loss, rows = mean_loss(self.model, batches, without)
            total = self.accelerator.reduce(torch.tensor([loss * rows, rows], device=self.device))
            values[name] = (total[0] / total[1]).item()
        return values

    def sample_condition(self) -> dict:
        """What the images in samples/ are drawn for: arguments of the pipeline."""
        prompts = self.config.sample_prompts
        if prompts is not None and self.config.conditioning == "class":
            return {"class_labels": prompts}
        if prompts is not None:
            return {"prompt": prompts}
        rows = self.train if self.test is None else self.test
        samples = next(batches_once(rows, self.samples(rows, training=False), list, SAMPLES))
        if "label" in samples[0]:
            return {"class_labels": [sample["label"] for sample in samples]}
        if "caption" in samples[0]:
            return {"prompt": [sample["caption"] for sample in samples]}
        condition = self.collate(samples)
        del condition["codes"]
        return condition

    def facts(self, metrics: dict[str, float]) -> dict:
        """What training.json says: data, tokenizer, codes, this training, and conditions that suit the model."""
        config, info = self.config, read_codes_info(self.config.codes_dir)
        names = ("rows", "crops", "num_crops", "crop_ranges")
        facts = read_facts(EMOJI_CHECKPOINT if is_shipped(config.tokenizer) else config.tokenizer)
        facts |= {"codes": {name: info[name] for name in names}}
        facts["generator"] = training_facts(config, metrics)
        condition = self.sample_condition()
        facts["examples"] = condition.get("prompt") or condition.get("class_labels") or []
        return facts

    def draw(self) -> Image.Image:
        """Images of `sample_prompts`, or of the first rows' conditions, with the seeds 0, 1, 2, ..."""
        pipe = AutoregressiveImagePipeline(self.vq_model, self.transformer, self.text_encoder, self.tokenizer)
        pipe.set_progress_bar_config(disable=True)
        condition = self.sample_condition()
        modules = [module for module in (self.transformer, self.text_encoder) if module is not None]
        were_training = [module.training for module in modules]
        for module in modules:
            module.eval()
        count = len(next(iter(condition.values())))
        seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
        images = pipe(**condition, generator=seeds, **self.config.sampling_defaults).images
        for module, was_training in zip(modules, were_training, strict=True):
            module.train(was_training)
        return side_by_side([images])

    def speed(self, steps_per_second: float) -> dict[str, float]:
        images = steps_per_second * self.config.batch_size
        values = {"images/s": images, "tokens/s": images * self.transformer.config.num_codes}
        if peak := peak_flops(self.device):
            values["mfu"] = images * self.flops_per_image / (peak * self.accelerator.num_processes)
        return values

    def save(self) -> None:
        """The adapter, or the whole pipeline, in `output_dir`."""
        state = self.accelerator.get_state_dict(self.model) if self.training.is_sharded else None
        if not self.accelerator.is_main_process:
            return
        output_dir = self.training.output_dir
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


def state_of_part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """What a state says of one module, whose names in it begin with `prefix`."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def unsharded(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of a sharded model with all of its weights."""
    whole = type(model)(model.config)
    whole.load_state_dict(state)
    return whole
