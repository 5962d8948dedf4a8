"""Code grids with their captions: what the generator learns from."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .captions import write_caption


def load_codes(folder: str, split: str, fingerprint: str) -> Dataset:
    """One split that [`extract_codes`] wrote; a `ValueError` if another tokenizer did or if it is missing."""
    path = Path(folder) / f"{split}.parquet"
    if not path.is_file():
        raise ValueError(f"There are no codes at {path}; run extract_codes first.")
    rows = load_dataset("parquet", data_files=str(path), split="train")
    if rows[0]["tokenizer"] != fingerprint:
        raise ValueError(
            f"The codes in {path} come from another tokenizer ({rows[0]['tokenizer']}, not {fingerprint}); "
            "run extract_codes again."
        )
    return rows


class CodeDataset(TorchDataset):
    """Rows that `extract_codes` wrote, each as a code grid and one caption.

    What is drawn for a row depends on seed, epoch and row alone, not on workers, prefetching or where a run resumed.

    Args:
        rows (`datasets.Dataset`): Rows with `codes` (crops, codes) and the columns of the templates.
        templates (`dict[str, float]`): See [`write_caption`].
        training (`bool`): Draw a crop and a template; else take the first of both.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
    """

    def __init__(self, rows: Dataset, templates: dict[str, float], training: bool, seed: int = 0):
        self.rows = rows
        self.templates = templates if training else {next(iter(templates)): 1.0}
        self.training = training
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw anew, for each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        rng = random.Random(f"{self.seed}-{self.epoch}-{index}")
        codes = rng.choice(row["codes"]) if self.training else row["codes"][0]
        return {"codes": codes, "caption": write_caption(row, self.templates, rng)}


def code_loader(dataset: CodeDataset, tokenize: Callable, batch_size: int) -> DataLoader:
    """Batches of `codes` (batch, codes), `input_ids` and `attention_mask` (batch, words), shuffled for training."""

    def collate(batch):
        input_ids, attention_mask = tokenize([row["caption"] for row in batch])
        codes = torch.tensor([row["codes"] for row in batch])
        return {"codes": codes, "input_ids": input_ids, "attention_mask": attention_mask}

    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=dataset.training,
        drop_last=dataset.training,
        collate_fn=collate,
        # Of its own: an iterator that starts mid-epoch must not take a number from dropout's random state.
        generator=torch.Generator(),
    )
