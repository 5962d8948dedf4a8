"""Code grids with their conditions: what the generator learns from."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, load_dataset
from huggingface_hub import snapshot_download

from ...conditioning.cache import decode_states, pad_left
from ...conditioning.text import clean_prompt
from ...data.samples import BadRow, template_columns, write_caption


def find_codes(source: str) -> Path:
    """The folder of codes; those that were published as a dataset are fetched by their Hub id."""
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return Path(source)
    try:
        return Path(snapshot_download(source, repo_type="dataset"))
    except OSError:  # a folder that is not there, most likely
        return Path(source)


def read_codes_info(folder: str) -> dict:
    """What [`~llamagen_hf.llamagen.training.extraction.extract_codes`] recorded about its run: tokenizer, grid, crops.

    Raises:
        ValueError: If it did not run.
    """
    path = find_codes(folder) / "codes.json"
    if not path.is_file():
        raise ValueError(f"There are no codes at {folder!r}; run extract_codes first.")
    return json.loads(path.read_text(encoding="utf-8"))


def load_codes(folder: str, split: str, fingerprint: str) -> Dataset | None:
    """One split that [`~llamagen_hf.llamagen.training.extraction.extract_codes`] wrote, `None` if it has no shards.

    Raises:
        ValueError: If there are no codes, if they are incomplete, or if another tokenizer made them.
    """
    info = read_codes_info(folder)
    found = info["tokenizer_fingerprint"]
    if found != fingerprint:
        raise ValueError(
            f"The codes in {folder} come from another tokenizer ({found}, not {fingerprint}); run extract_codes again."
        )
    if "rows" not in info:
        raise ValueError(f"The codes in {folder} are incomplete; start extract_codes again, and it will go on.")
    shards = sorted(str(path) for path in find_codes(folder).glob(f"{split}-*.parquet"))
    return load_dataset("parquet", data_files=shards, split="train") if shards else None


class CodeSamples:
    """Turns a row of codes into a sample: a code grid and a caption, a class, or stored text encoder states.

    Args:
        rows (`datasets.Dataset`): The rows to come, for their columns and names of classes.
        templates (`dict[str, float]`, *optional*): For text conditions, see [`write_caption`].
        label_column (`str`, *optional*): For class conditions, the column with the class ids.
        num_classes (`int`, *optional*): Class ids must be below.
        stored_states (`bool`, *optional*, defaults to `False`):
            Take the states that `extract_codes` stored of a caption, not the caption.
        prompt_cleaning (`str`, *optional*): Refuse captions of which this cleaning leaves nothing, see
            [`~llamagen_hf.conditioning.text.clean_prompt`].
        training (`bool`, *optional*, defaults to `True`): Draw a crop and a template; else take the first of both.

    Raises:
        ValueError: If a column is missing.
    """

    def __init__(
        self,
        rows: Dataset,
        templates: dict[str, float] | None = None,
        label_column: str | None = None,
        num_classes: int | None = None,
        stored_states: bool = False,
        prompt_cleaning: str | None = None,
        training: bool = True,
    ):
        self.templates = templates if training or not templates else {next(iter(templates)): 1.0}
        self.label_column = label_column
        self.num_classes = num_classes
        self.stored_states = stored_states
        self.prompt_cleaning = prompt_cleaning
        self.training = training
        self.names = {
            column: feature.names for column, feature in rows.features.items() if isinstance(feature, ClassLabel)
        }
        self.columns = ["codes", label_column] if label_column else ["codes", *self._template_columns()]
        missing = [column for column in self.columns if column not in rows.column_names]
        if missing:
            raise ValueError(f"The codes have no column {missing[0]!r}; they have {rows.column_names}.")

    def _template_columns(self) -> list[str]:
        columns = {column for template in self.templates for column in template_columns(template)}
        if not self.stored_states:
            return sorted(columns)
        if any(template != "{" + template[1:-1] + "}" for template in self.templates):
            raise ValueError("With stored text states every caption template is one column, such as '{caption}'.")
        return sorted(f"{column}_states" for column in columns)

    def __call__(self, row: dict, rng: random.Random) -> dict:
        codes = rng.choice(row["codes"]) if self.training else row["codes"][0]
        if self.label_column is not None:
            label = row[self.label_column]
            if label is None or not 0 <= label < self.num_classes:
                raise BadRow(f"label out of range: {label} is not in 0..{self.num_classes - 1}")
            return {"codes": codes, "label": label}
        if self.stored_states:
            (column,) = rng.choices([t[1:-1] for t in self.templates], weights=list(self.templates.values()))
            states = row[f"{column}_states"]
            if states is None:
                raise BadRow("no caption")
            return {"codes": codes, "states": states}
        for column in self.names.keys() & row.keys():
            label = row[column]
            row = row | {column: None if label is None or label < 0 else self.names[column][label]}
        caption = write_caption(row, self.templates, rng)
        if self.prompt_cleaning is not None and not clean_prompt(caption, self.prompt_cleaning):
            raise BadRow(f"nothing is left of the caption by prompt_cleaning {self.prompt_cleaning!r}")
        return {"codes": codes, "caption": caption}


class CodeCollator:
    """Samples to a batch of tensors, named as generator training takes them.

    See the forward of [`~llamagen_hf.llamagen.training.condition_to_codes.ConditionToCodes`].

    Args:
        tokenize (`Callable`, *optional*): Captions to `input_ids` and `attention_mask`.
        condition_length (`int`, *optional*): Positions to which stored states are padded on the left.
        condition_dim (`int`, *optional*): Their width.
    """

    def __init__(
        self, tokenize: Callable | None = None, condition_length: int | None = None, condition_dim: int | None = None
    ):
        self.tokenize = tokenize
        self.condition_length = condition_length
        self.condition_dim = condition_dim

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = {"codes": torch.tensor([sample["codes"] for sample in samples])}
        if "label" in samples[0]:
            batch["class_labels"] = torch.tensor([sample["label"] for sample in samples])
        elif "states" in samples[0]:
            states = [decode_states(sample["states"], self.condition_dim) for sample in samples]
            batch["prompt_embeds"], batch["prompt_attention_mask"] = pad_left(states, self.condition_length)
        else:
            batch["input_ids"], batch["attention_mask"] = self.tokenize([sample["caption"] for sample in samples])
        return batch
