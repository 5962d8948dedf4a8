"""Training of the generator: the next code, given a caption and the codes before it."""

import random
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ..configuration import LlamaGenConfig
from ..data.captions import write_caption
from ..data.codes import CodeDataset, code_loader, load_codes
from ..data.extraction import tokenizer_fingerprint
from ..modeling import LlamaGenForConditionalGeneration
from ..pipeline import AutoregressiveImagePipeline
from ..prompts import encode_tokens, tokenize_prompts
from ..vq_model import LlamaGenVQModel
from .checkpoints import latest_checkpoint, resume, save_checkpoint
from .text_encoder import build_text_encoder, pretrain_text_encoder, train_text_tokenizer


logger = get_logger(__name__)


@dataclass
class GeneratorTrainingConfig:
    """One run of text-conditional generator training, with a small text encoder that learns along."""

    codes_dir: str = field(metadata={"help": "Folder that extract_codes wrote."})
    tokenizer: str = field(metadata={"help": "Folder or Hub id of the image tokenizer that wrote the codes."})
    output_dir: str = field(metadata={"help": "Folder for the pipeline, with checkpoints/ below it."})
    init_from: str | None = field(
        default=None, metadata={"help": "Pipeline folder or Hub id to start from; its sizes count, not those below."}
    )
    caption_templates: dict = field(
        default_factory=lambda: {"{caption}": 1.0},
        metadata={
            "help": "Captions with the columns' names in braces, and their weights; the first one is for tests."
        },
    )
    hidden_size: int = field(default=768, metadata={"help": "Width of the Llama."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of its SwiGLU."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Layers of the Llama."})
    num_attention_heads: int = field(default=12, metadata={"help": "Heads of the Llama."})
    condition_length: int = field(default=120, metadata={"help": "Positions of a prompt."})
    text_vocab_size: int = field(default=2048, metadata={"help": "Tokens of the text tokenizer."})
    text_width: int = field(default=256, metadata={"help": "Width of the text encoder."})
    text_layers: int = field(default=3, metadata={"help": "Layers of the text encoder."})
    text_heads: int = field(default=4, metadata={"help": "Heads of the text encoder."})
    text_pretrain_steps: int = field(
        default=0, metadata={"help": "Steps in which a new text encoder learns what its captions look like, first."}
    )
    text_pretrain_learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of these steps."})
    dropout: float = field(default=0.1, metadata={"help": "Embedding, residual and FFN dropout."})
    condition_dropout: float = field(default=0.1, metadata={"help": "Chance of the null condition."})
    max_train_steps: int = field(default=100_000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=64, metadata={"help": "Images a step and process."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak rate."})
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of text encoder and projector; learning_rate by default."}
    )
    lr_scheduler: str = field(default="constant_with_warmup", metadata={"help": "A name diffusers knows."})
    lr_warmup_steps: int = field(default=200, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of matrices; vectors have none."})
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the averaged weights, which are saved."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16."})
    checkpointing_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept."})
    log_steps: int = field(default=50, metadata={"help": "Steps between log lines."})
    eval_steps: int = field(default=1000, metadata={"help": "Steps between measurements on the test split."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, data order, captions and dropout."})
    sampling_defaults: dict = field(default_factory=dict, metadata={"help": "Saved with the pipeline."})


class TextToCodes(nn.Module):
    """The text encoder and the Llama as one module, so that one optimizer, EMA and launcher sees both."""

    def __init__(self, transformer: LlamaGenForConditionalGeneration, text_encoder: nn.Module):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def forward(self, codes, input_ids, attention_mask, without_prompt: bool = False) -> torch.Tensor:
        """Mean cross-entropy of the codes, in nats; `without_prompt` puts the null condition in its place."""
        length = self.transformer.config.condition_length
        states, mask = encode_tokens(self.text_encoder, input_ids, attention_mask, length)
        if without_prompt:
            states = self.transformer.model.uncond_embedding(len(states)).to(states.dtype)
        inputs = {"prompt_embeds": states, "prompt_attention_mask": mask, "use_cache": False}
        return self.transformer(codes[:, :-1], **inputs, labels=codes).loss


def parameter_groups(model: TextToCodes, config: GeneratorTrainingConfig) -> list[dict]:
    """AdamW groups: decay for matrices and none for vectors as in the paper, and the text path's own rate.

    At the rate that suits a small Llama, a projector that starts to learn along with it grows one large vector for
    all prompts within a few hundred steps and tells them apart no more. A slower one does not.
    """
    text_rate = config.learning_rate if config.text_learning_rate is None else config.text_learning_rate
    text_path = ("text_encoder.", "transformer.model.text_projector.", "transformer.model.uncond_embedding.")
    groups = []
    for is_text, rate in ((False, config.learning_rate), (True, text_rate)):
        chosen = [p for name, p in model.named_parameters() if name.startswith(text_path) == is_text]
        matrices, vectors = [p for p in chosen if p.ndim >= 2], [p for p in chosen if p.ndim < 2]
        groups.append({"params": matrices, "lr": rate, "weight_decay": config.weight_decay})
        groups.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
    return groups


@torch.no_grad()
def evaluate_generator(model: TextToCodes, loader: DataLoader, without_prompt: bool = False) -> float:
    """Mean cross-entropy in nats over all codes of a split."""
    was_training = model.training
    model.eval()
    total = rows = 0
    for batch in loader:
        batch = {name: value.to(model.transformer.device) for name, value in batch.items()}
        total += model(**batch, without_prompt=without_prompt).item() * len(batch["codes"])
        rows += len(batch["codes"])
    model.train(was_training)
    return total / rows


def build_model(
    config: GeneratorTrainingConfig, tokenizer: PreTrainedTokenizerBase, vq_model: LlamaGenVQModel, grid_size: int
) -> TextToCodes:
    """A generator and a text encoder with new weights."""
    transformer = LlamaGenForConditionalGeneration(
        LlamaGenConfig(
            vocab_size=vq_model.config.num_vq_embeddings,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            grid_size=grid_size,
            conditioning="text",
            condition_length=config.condition_length,
            condition_dim=config.text_width,
            embedding_dropout=config.dropout,
            residual_dropout=config.dropout,
            ffn_dropout=config.dropout,
            condition_dropout=config.condition_dropout,
        )
    )
    nn.init.zeros_(transformer.lm_head.weight)  # all codes equally likely at the start, as in the released training
    text_encoder = build_text_encoder(tokenizer, config.text_width, config.text_layers, config.text_heads)
    return TextToCodes(transformer, text_encoder)


def train_generator(config: GeneratorTrainingConfig) -> dict[str, float]:
    """Train the generator and its text encoder, resuming from the newest checkpoint of `config.output_dir`.

    Returns:
        `dict[str, float]`: `train_loss` of the last steps and the averaged model's `test_loss`, in nats a code. The
        pipeline is saved to `config.output_dir`.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        step_scheduler_with_optimizer=False,
    )
    output_dir = Path(config.output_dir)
    set_seed(config.seed)
    vq_model = LlamaGenVQModel.from_pretrained(config.tokenizer)
    fingerprint = tokenizer_fingerprint(vq_model)
    train = load_codes(config.codes_dir, "train", fingerprint)
    test = load_codes(config.codes_dir, "test", fingerprint)
    rng = random.Random(config.seed)
    if config.init_from is not None:
        pipe = AutoregressiveImagePipeline.from_pretrained(config.init_from)
        tokenizer, model = pipe.tokenizer, TextToCodes(pipe.transformer, pipe.text_encoder).train()
    else:
        corpus = [write_caption(row, config.caption_templates, rng) for row in train for _ in range(3)]
        tokenizer = train_text_tokenizer(corpus, config.text_vocab_size, config.condition_length)
        model = build_model(config, tokenizer, vq_model, grid_size=round(len(train[0]["codes"][0]) ** 0.5)).train()

    tokenize = partial(tokenize_prompts, tokenizer, length=config.condition_length)
    templates = config.caption_templates
    dataset = CodeDataset(train, templates, training=True, seed=config.seed)
    loader = code_loader(dataset, tokenize, config.batch_size)
    is_new = config.init_from is None and latest_checkpoint(output_dir / "checkpoints") is None
    if is_new and config.text_pretrain_steps:
        rate = config.text_pretrain_learning_rate
        pretrain_text_encoder(model.text_encoder, loader, vq_model, config.text_pretrain_steps, rate)
    test_loader = code_loader(CodeDataset(test, templates, training=False), tokenize, config.batch_size)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.learning_rate, betas=(0.9, 0.95))
    scheduler = get_scheduler(config.lr_scheduler, optimizer, None, config.lr_warmup_steps, config.max_train_steps)
    ema = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(ema, scheduler)
    step = resume(accelerator, output_dir / "checkpoints")
    ema.to(accelerator.device)
    raw = accelerator.unwrap_model(model)
    if len(loader) == 0:
        raise ValueError(f"{len(dataset)} pictures do not fill one batch of {config.batch_size} on each process.")

    def measure() -> dict[str, float]:
        ema.store(raw.parameters())
        ema.copy_to(raw.parameters())
        values = {
            "test_loss": evaluate_generator(raw, test_loader),
            "test_loss_without_prompt": evaluate_generator(raw, test_loader, without_prompt=True),
        }
        ema.restore(raw.parameters())
        return values

    losses = []
    started, first = time.perf_counter(), step
    while step < config.max_train_steps:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        dataset.set_epoch(epoch)  # with several processes, accelerate tells the sampler only
        for batch in accelerator.skip_first_batches(loader, done):
            loss = model(**batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            ema.step(raw.parameters())
            losses.append(loss.detach())
            step += 1

            if step % config.log_steps == 0:
                rate = (step - first) * config.batch_size * accelerator.num_processes / (time.perf_counter() - started)
                mean = torch.stack(losses[-config.log_steps :]).mean().item()
                logger.info(f"step {step}: loss {mean:.4f}, {rate:.1f} images/s")
            if step % config.eval_steps == 0:
                logger.info(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in measure().items()))
            if step % config.checkpointing_steps == 0 or step == config.max_train_steps:
                save_checkpoint(accelerator, output_dir / "checkpoints", step, config.checkpoints_total_limit)
            if step == config.max_train_steps:
                break

    metrics = measure()
    if losses:
        metrics["train_loss"] = torch.stack(losses[-config.eval_steps :]).mean().item()
    ema.copy_to(raw.parameters())
    raw.eval()
    if accelerator.is_main_process:
        pipe = AutoregressiveImagePipeline(
            vq_model, raw.transformer, raw.text_encoder, tokenizer, config.sampling_defaults or None
        )
        pipe.save_pretrained(output_dir)
    accelerator.end_training()
    return metrics
