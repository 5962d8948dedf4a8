"""Training of a CLIP: which caption belongs to which image."""

import math
from pathlib import Path

import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, IterableDataset
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn

from ...clip import pixel_values
from ...data.captions import Captions
from ...data.fingerprint import Inputs, fingerprint_components, fingerprint_rows
from ...data.loader import StepLoader, batches_once
from ...data.samples import ImageSamples
from ...data.source import DataConfig
from ...evaluation.text import r_precision, retrieval_recall
from ...files import replace_result
from ...training.record import public_settings, training_facts
from ...training.single_model import SingleModelTask, parameter_groups
from ...training.trainer import Trainer
from .clip_config import CLIPTrainingConfig
from .clip_loss import CLIPEmbedder, contrastive_loss, embedding_gradients, step_loss
from .clip_models import build_clip
from .clip_samples import CLIPCollator, CLIPSamples


MAX_LOGIT_SCALE = math.log(100)  # as in CLIP's training: a temperature of at least 0.01
CANDIDATES = 100  # of R-precision
SAMPLES, SAMPLES_AMONG, BEST = 8, 256, 3


def train_clip(data: DataConfig, config: CLIPTrainingConfig) -> dict[str, float]:
    """Train a [`~transformers.CLIPModel`], resuming from the newest checkpoint of `config.output_dir`.

    The model is saved to `config.output_dir` with its processor, so that [`~llamagen_hf.clip.load_clip`],
    [`~llamagen_hf.clip.CLIPScorer`] and transformers load it like any CLIP. A step compares all rows of its batch, on
    however many processes and in however many micro-batches.

    Returns:
        `dict[str, float]`: Of the averaged weights, on the first `config.eval_images` test rows: `test_loss`, the
        contrastive loss among all of them; `test_image_to_text_r1` and `test_text_to_image_r1`, how often the nearest
        of all different captions is an image's own, and the nearest of all images one of the caption's; and
        `test_r_precision`, how often an image's own caption is the nearest of 100, or of all if there are fewer. Empty
        if there is no test split.

    Raises:
        ValueError: Recipe, data and models do not fit each other.
    """
    return Trainer(config, CLIPTask(data, config)).fit()


class CLIPTask(SingleModelTask):
    """The training of a CLIP, for [`~llamagen_hf.training.trainer.Trainer`]."""

    results = ("config.json",)

    def __init__(self, data: DataConfig, config: CLIPTrainingConfig):
        self.data, self.config = data, config
        self.max_bad_rows = data.max_bad_rows

    def load(self) -> None:
        if self.trainer.is_sharded:
            raise ValueError("A CLIP can't be sharded (FSDP), since its temperature is a single number; use DDP.")
        self.train, self.test = self.data.load("train"), self.data.load("test")
        self.clip, self.processor = build_clip(self.config, self.data, self.train)
        tokenizer = self.processor.tokenizer
        self.length = min(self.clip.config.text_config.max_position_embeddings, tokenizer.model_max_length)
        self.collate = CLIPCollator(tokenizer, self.length if self.trainer.compiles else None)

    def inputs(self) -> Inputs:
        """The images, the settings that choose among them, and the weights that are not new."""
        rows = fingerprint_rows(self.data, self.trainer.output_dir, [self.train, self.test])
        if self.config.init_from is None:
            return rows
        return rows | fingerprint_components({"init_from": self.clip, "tokenizer": self.processor.tokenizer})

    def step_loader(self) -> StepLoader:
        samples, size = self.samples(self.train), self.data.shuffle_buffer_size
        rows = self.train.select_columns(samples.columns)
        return self.trainer.step_loader(rows, samples, self.collate, shuffle_buffer_size=size)

    def samples(self, rows: Dataset | IterableDataset, training: bool = True) -> CLIPSamples:
        config = self.config
        images = ImageSamples(self.data, config.crop, config.random_flip) if training else ImageSamples(self.data)
        captions = Captions(rows, config.caption_templates, training=training)
        return CLIPSamples(images, captions, self.processor.tokenizer, self.length, config.truncate_captions)

    def prepare(self) -> tuple[nn.Module, list]:
        config, accelerator = self.config, self.trainer.accelerator
        if config.gradient_checkpointing:
            self.clip.gradient_checkpointing_enable({"use_reentrant": False})
        model = CLIPEmbedder(self.clip, self.trainer.compiles).train()
        groups = parameter_groups(model, config.learning_rate, None, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.adam_beta1, config.adam_beta2), fused=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.scheduler = self.trainer.scheduler(self.optimizer)
        return accelerator.unwrap_model(self.model), [self.scheduler]

    def encode(self, batch: dict) -> dict:
        """A batch of samples as the arguments of [`CLIPEmbedder`]: pixels normalised as the CLIP expects."""
        texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return {"pixel_values": pixel_values(self.processor, batch["images"])} | texts

    def train_step(self, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        accelerator = self.trainer.accelerator
        batches = [self.encode(batch) for batch in micro_batches]
        if len(batches) > 1:
            mean, gradients, of_scale = embedding_gradients(accelerator, self.model, batches)
        for number, batch in enumerate(batches):
            with accelerator.accumulate(self.model):
                images, texts, scale = self.model(**batch)
                if len(batches) == 1:
                    loss = step_loss(accelerator, images, texts, scale)
                    mean = loss.detach()
                else:  # a scalar with the same gradients; the accelerator divides it by the number of micro-batches
                    of_images, of_texts = gradients[number]
                    loss = len(batches) * ((of_images * images).sum() + (of_texts * texts).sum()) + of_scale * scale
                self.trainer.update(self.model, self.optimizer, loss)
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        rate = mean.new_tensor(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        return {"loss": mean, "learning_rate": rate, "logit_scale": self.clip.logit_scale.detach().clone()}

    @torch.no_grad()
    def embed(self, samples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the images and of the captions of samples, `(rows, d)` on the CPU."""
        inputs = self.encode(send_to_device(self.collate(samples), self.trainer.device))
        images, texts, _ = self.model(**inputs)
        return images.cpu(), texts.cpu()

    def measure(self) -> dict[str, float]:
        if self.test is None:
            return {}
        samples = self.samples(self.test, training=False)
        rows = self.test.select_columns(samples.columns).take(self.config.eval_images)
        parts = [
            (*self.embed(batch), [sample["caption"] for sample in batch])
            for batch in self.trainer.batches_once(rows, samples, list)
        ]
        parts = gather_object(parts)  # in the order of the rows
        captions = [caption for part in parts for caption in part[2]]
        texts_of = {caption: row for row, caption in reversed(list(enumerate(captions)))}
        distinct = dict.fromkeys(captions)
        if len(distinct) < 2:
            return {}
        images, texts = (torch.cat([part[side] for part in parts]) for side in (0, 1))
        scale = self.clip.logit_scale.detach().float().exp().cpu()
        numbers = {caption: number for number, caption in enumerate(distinct)}
        found = images, texts[[texts_of[caption] for caption in distinct]], [numbers[each] for each in captions]
        to_text, to_image = retrieval_recall(*found)
        return {
            "test_loss": contrastive_loss(images, texts, scale).item(),
            "test_image_to_text_r1": to_text,
            "test_text_to_image_r1": to_image,
            "test_r_precision": r_precision(*found, num_candidates=min(CANDIDATES, len(distinct))),
        }

    def draw_samples(self) -> Image.Image:
        """Images of 8 rows, and below each the 3 of 256 images that fit its caption best."""
        rows = self.train if self.test is None else self.test
        samples = self.samples(rows, training=False)
        rows = rows.select_columns(samples.columns).take(SAMPLES_AMONG)
        batches = list(batches_once(rows, samples, list, self.trainer.micro_batch_size))
        parts = [self.embed(batch) for batch in batches]
        images, texts = (torch.cat([part[side] for part in parts]) for side in (0, 1))
        best = (texts[:SAMPLES] @ images.T).topk(min(BEST, len(images))).indices
        chosen = torch.cat([torch.arange(len(best))[None], best.T])
        pixels = torch.stack([sample["images"] for batch in batches for sample in batch])[chosen.flatten()]
        return make_image_grid(VaeImageProcessor().postprocess(pixels, output_type="pil"), *chosen.shape)

    def save(self) -> None:
        """Save the model with its processor."""

        def save(folder: Path) -> None:
            self.clip.save_pretrained(folder)
            self.processor.save_pretrained(folder)

        if self.trainer.accelerator.is_main_process:
            replace_result(self.trainer.output_dir, "config.json", save)

    def facts(self, metrics: dict[str, float]) -> dict:
        """Data and this training."""
        return {"data": public_settings(self.data), "clip": training_facts(self.config, metrics)}
