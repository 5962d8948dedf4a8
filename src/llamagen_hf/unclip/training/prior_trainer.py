"""Training of a prior: which image embedding belongs to a caption, given a frozen CLIP."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, IterableDataset
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn

from ...data.captions import Captions
from ...data.fingerprint import Inputs, fingerprint_components, fingerprint_rows
from ...data.loader import StepLoader, batches_once
from ...data.source import DataConfig
from ...files import replace_result
from ...training.record import public_settings, training_facts
from ...training.sharding import state_of_part, unsharded
from ...training.single_model import SingleModelTask, parameter_groups
from ...training.trainer import Trainer
from ..clip_encoders import PROMPT_CLEANING, TextCondition, encode_captions, encode_pixels
from ..prior import EmbeddingPriorPipeline
from .prior_config import PriorTrainingConfig
from .prior_models import PriorLoss, build_pipeline
from .prior_samples import PriorSamples


logger = get_logger(__name__)

SAMPLES = 8


def train_prior(data: DataConfig, prior: PriorTrainingConfig) -> dict[str, float]:
    """Train an [`EmbeddingPriorPipeline`], resuming from the newest checkpoint of `prior.output_dir`.

    The pipeline is saved to `prior.output_dir`, CLIP included.

    Returns:
        `dict[str, float]`: `test_loss` of the averaged weights; `test_cosine`, that of drawn embeddings to those of
        the images; `test_retrieval`, for which share of the first `eval_rows` test captions the image of the drawn
        embedding's largest cosine is its own. `test_text_cosine` and `test_text_retrieval` are the same of CLIP's
        embeddings of the captions. Empty if there is no test split.

    Raises:
        ValueError: Recipe, data and models do not fit each other.
    """
    return Trainer(prior, PriorTask(data, prior)).fit()


class PriorTask(SingleModelTask):
    """The training of a prior, for [`~llamagen_hf.training.trainer.Trainer`]."""

    results = (EmbeddingPriorPipeline.config_name,)

    def __init__(self, data: DataConfig, config: PriorTrainingConfig):
        self.data, self.config = data, config
        self.max_bad_rows = data.max_bad_rows

    def load(self) -> None:
        self.train, self.test = self.data.load("train"), self.data.load("test")
        self.pipe = build_pipeline(self.config)
        self.pipe.set_progress_bar_config(disable=True)
        for encoder in (self.pipe.text_encoder, self.pipe.image_encoder):
            encoder.to(self.trainer.device).requires_grad_(False)
        if self.config.sampling_defaults:
            # Checked now, and not after the training.
            self.pipe = EmbeddingPriorPipeline(**self.pipe.components, sampling_defaults=self.config.sampling_defaults)
            self.pipe.set_progress_bar_config(disable=True)
        self.loss = PriorLoss(self.pipe, self.trainer.compiles)

    def inputs(self) -> Inputs:
        """The images, the settings that choose among them, and the weights that are not new."""
        pipe = self.pipe
        components = {"clip": nn.ModuleList([pipe.text_encoder, pipe.image_encoder]), "tokenizer": pipe.tokenizer}
        if self.config.init_from is not None:
            components["init_from"] = pipe.prior
        rows = fingerprint_rows(self.data, self.trainer.output_dir, [self.train, self.test])
        return rows | fingerprint_components(components)

    def samples(self, rows: Dataset | IterableDataset, training: bool = True) -> PriorSamples:
        pipe = self.pipe
        captions = Captions(rows, self.config.caption_templates, PROMPT_CLEANING, training)
        return PriorSamples(
            self.data, captions, self.config, pipe.tokenizer, pipe.image_processor, pipe.condition_length, training
        )

    def step_loader(self) -> StepLoader:
        samples, size = self.samples(self.train), self.data.shuffle_buffer_size
        rows = self.train.select_columns(samples.columns)
        return self.trainer.step_loader(rows, samples, samples.collate, shuffle_buffer_size=size)

    def pretrain(self, steps: Iterable[list[dict]]) -> None:
        """Measure the embeddings of training images, unless the prior's weights expect certain statistics."""
        if self.config.init_from is not None:
            return
        # Once through, since a stream does not say how long it is.
        samples = self.samples(self.train, training=False)
        rows, count = self.train.select_columns(samples.columns), self.config.statistics_rows
        rows = rows.take(min(count, len(rows)) if isinstance(rows, Dataset) else count)
        batches = self.trainer.batches_once(rows, samples, samples.collate)
        # In the order of the processes, on each of them.
        found = gather_object([self.embed_images(batch).cpu() for batch in batches])
        if not found:
            return  # the first step says what is wrong with the rows
        embeds = torch.cat(found)
        logger.info(f"The statistics are those of {len(embeds)} image embeddings.")
        self.loss.measure_statistics(embeds)

    def prepare(self) -> tuple[nn.Module, list]:
        config, accelerator = self.config, self.trainer.accelerator
        if config.gradient_checkpointing:
            raise ValueError("gradient_checkpointing is not supported for priors; leave it out.")
        model = self.loss.train()
        groups = parameter_groups(model, config.learning_rate, None, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.adam_beta1, config.adam_beta2), fused=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.scheduler = self.trainer.scheduler(self.optimizer)
        return accelerator.unwrap_model(self.model), [self.scheduler]

    @torch.no_grad()
    def embed_images(self, batch: dict) -> torch.Tensor:
        """CLIP's embeddings of a batch's images, in float32 whatever the training runs in."""
        with torch.autocast(self.trainer.device.type, enabled=False):
            return encode_pixels(self.pipe.image_encoder, batch["pixel_values"].to(self.trainer.device))

    @torch.no_grad()
    def embed_captions(self, batch: dict) -> TextCondition:
        """What the prior reads of a batch's captions, in float32 too."""
        with torch.autocast(self.trainer.device.type, enabled=False):
            return encode_captions(self.pipe.text_encoder, batch["input_ids"], batch["attention_mask"])

    def encode(self, batch: dict) -> dict:
        """A batch of samples as the arguments of [`PriorLoss`]."""
        image_embeds, text = self.embed_images(batch), self.embed_captions(batch)
        device, shape = image_embeds.device, image_embeds.shape
        generators = [torch.Generator(device).manual_seed(seed) for seed in batch["seeds"].tolist()]
        noise = randn_tensor(shape, generators, device, torch.float32)
        return {"image_embeds": image_embeds, "noise": noise, "timesteps": batch["timesteps"], **vars(text)}

    def measure(self) -> dict[str, float]:
        if self.test is None:
            return {}
        values = {"test_loss": self.mean_loss()}
        # A part of a sharded model can't be called without the rest, as the sampling loop would.
        return values if self.trainer.is_sharded else values | self.measure_embeddings()

    def test_batches(self, num_rows: int | None = None) -> Iterator[dict]:
        """This process's part of the test rows, or of the first of them."""
        samples = self.samples(self.test, training=False)
        rows = self.test.select_columns(samples.columns)
        if num_rows is not None:
            rows = rows.take(min(num_rows, len(rows)) if isinstance(rows, Dataset) else num_rows)
        for batch in self.trainer.batches_once(rows, samples, samples.collate):
            yield send_to_device(batch, self.trainer.device)

    @torch.no_grad()
    def mean_loss(self) -> float:
        """The loss over all test rows."""
        total = torch.zeros(2, device=self.trainer.device)
        for batch in self.test_batches():
            rows = len(batch["seeds"])
            total += torch.stack([rows * self.model(**self.encode(batch)), total.new_tensor(rows)])
        total = self.trainer.accelerator.reduce(total)
        return (total[0] / total[1]).item()

    @torch.no_grad()
    def measure_embeddings(self) -> dict[str, float]:
        """How near drawn embeddings, and those of the captions, are to those of the images."""
        found = []
        for batch in self.test_batches(self.config.eval_rows):
            texts = F.normalize(self.embed_captions(batch).embeds, dim=-1)
            triple = (self.embed_images(batch), self.draw(batch), texts)
            found.append([each.float().cpu() for each in triple])
        found = gather_object(found)
        images, drawn, texts = (torch.cat(each) for each in zip(*found, strict=True))
        values = {}
        for name, embeds in (("", drawn), ("text_", texts)):
            values[f"test_{name}cosine"] = (embeds * images).sum(-1).mean().item()
            nearest = (embeds @ images.T).argmax(-1)
            values[f"test_{name}retrieval"] = (nearest == torch.arange(len(images))).float().mean().item()
        return values

    def draw(self, batch: dict) -> torch.Tensor:
        """The embeddings that the present weights draw for the captions of a batch, with the seeds of its rows."""
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"].tolist()]
        return self.pipe(batch["captions"], generator=generators, truncate_prompt=True).image_embeds

    @torch.no_grad()
    def draw_samples(self) -> Image.Image:
        """Test images, and below each the one whose embedding is nearest to the embedding drawn for its caption."""
        rows = self.train if self.test is None else self.test
        samples, count = self.samples(rows, training=False), max(SAMPLES, self.config.eval_rows)
        rows = rows.select_columns(samples.columns)
        batch = next(batches_once(rows, samples, samples.collate, count))
        batch = send_to_device(batch, self.trainer.device)
        shown = {name: value[:SAMPLES] for name, value in batch.items()}
        drawn = self.draw(shown).float()
        nearest = (drawn @ self.embed_images(batch).T).argmax(-1)
        pixels = torch.cat([shown["pixel_values"], batch["pixel_values"][nearest]]).float().cpu()
        processor = self.pipe.image_processor
        mean, deviation = (torch.tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
        images = VaeImageProcessor().postprocess(2 * (pixels * deviation + mean) - 1, output_type="pil")
        return make_image_grid(images, 2, len(images) // 2)

    def save(self) -> None:
        """Save the whole pipeline."""
        accelerator, pipe = self.trainer.accelerator, self.pipe
        state = accelerator.get_state_dict(self.model) if self.trainer.is_sharded else None
        if not accelerator.is_main_process:
            return
        if state is not None:
            prior = unsharded(pipe.prior, state_of_part(state, "prior."))
            pipe = EmbeddingPriorPipeline(
                **pipe.components | {"prior": prior}, sampling_defaults=pipe.config.sampling_defaults
            )
        replace_result(self.trainer.output_dir, pipe.config_name, pipe.save_pretrained)

    def facts(self, metrics: dict[str, float]) -> dict:
        """Data and this training."""
        return {"data": public_settings(self.data), "prior": training_facts(self.config, metrics)}
