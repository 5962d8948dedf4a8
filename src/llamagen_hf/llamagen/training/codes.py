"""Code grids with their conditions, as the generator's training reads them."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from huggingface_hub import snapshot_download

from ...conditioning.cache import decode_states, pad_left
from ...data.captions import Captions, template_columns
from ...data.samples import BadRow


# Keys of codes.json in earlier versions.
RENAMED = {"tokenizer": "vq_model", "tokenizer_fingerprint": "vq_model_fingerprint"}


def find_codes(source: str | Path) -> Path:
    """The folder of codes; for the Hub id of published codes, the folder that they are downloaded to."""
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        return Path(source)
    try:
        return Path(snapshot_download(str(source), repo_type="dataset"))
    except OSError:  # most likely a folder that does not exist
        return Path(source)


def read_codes_info(folder: str | Path) -> dict:
    """The content of codes.json, in which extraction records image tokenizer, grid and crops, under today's names.

    Raises:
        ValueError: There are no codes.
    """
    path = find_codes(folder) / "codes.json"
    if not path.is_file():
        raise ValueError(f"There are no codes at {folder!r}; run extract_codes first.")
    info = json.loads(path.read_text(encoding="utf-8"))
    return {RENAMED.get(name, name): value for name, value in info.items()}


def stored_dim(info: dict, templates: dict[str, float]) -> int:
    """Width of the stored states that caption templates name: text states, or with `{image}` embeddings of images.

    Args:
        info (`dict`): The content of codes.json.
        templates (`dict[str, float]`): Names of columns in braces.

    Raises:
        ValueError: The codes have no such states, or the templates name states of both kinds.
    """
    of_images = reads_images(templates)
    if of_images and len(templates) > 1:
        raise ValueError(
            "Embeddings of images and text states can't be mixed: '{image}' is the only caption template."
        )
    kind, setting = ("image", "clip") if of_images else ("text", "text_encoder")
    if f"{kind}_dim" not in info:
        raise ValueError(f"The codes have no {kind} states; run extract_codes with {setting}.")
    return info[f"{kind}_dim"]


def reads_images(templates: dict[str, float]) -> bool:
    """Whether caption templates name the stored embeddings of images."""
    return "{image}" in templates


def load_codes(folder: str | Path, split: str, fingerprint: str) -> Dataset | None:
    """One split of extracted codes, `None` if it has no shards.

    Args:
        folder (`str` or `os.PathLike`): The folder of the codes, or their Hub id.
        split (`str`): `"train"` or `"test"`.
        fingerprint (`str`): The [`~llamagen_hf.data.fingerprint.vq_model_fingerprint`] that the codes must have.

    Raises:
        ValueError: There are no codes, they are incomplete, or another tokenizer made them.
    """
    info = read_codes_info(folder)
    found = info["vq_model_fingerprint"]
    if found != fingerprint:
        raise ValueError(
            f"The codes in {folder} come from another tokenizer ({found}, not {fingerprint}); run extract_codes again."
        )
    if "rows" not in info:
        raise ValueError(f"The codes in {folder} are incomplete; start extract_codes again, and it will go on.")
    shards = sorted(str(path) for path in find_codes(folder).glob(f"{split}-*.parquet"))
    return load_dataset("parquet", data_files=shards, split="train") if shards else None


class CodeSamples:
    """Turns a row of codes into a sample: a code grid and a caption, a class, or stored text states.

    Args:
        rows (`datasets.Dataset`): The rows, for their columns and names of classes.
        templates (`dict[str, float]`, *optional*): For text conditions, see
            [`~llamagen_hf.data.captions.write_caption`].
        label_column (`str`, *optional*): For class conditions, the column with the class ids.
        num_classes (`int`, *optional*): Class ids must be below it.
        stored_states (`bool`, *optional*, defaults to `False`):
            Take the states that `extract_codes` stored for a caption, not the caption.
        prompt_cleaning (`str`, *optional*): Refuse captions of which this cleaning leaves nothing, see
            [`~llamagen_hf.conditioning.text.clean_prompt`].
        training (`bool`, *optional*, defaults to `True`): Draw a crop and a template; else take the first of both.

    Raises:
        ValueError: A column is missing, or a template does not fit stored states.
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
        self.training = training
        self.columns = ["codes", label_column] if label_column else ["codes", *self._template_columns()]
        missing = [column for column in self.columns if column not in rows.column_names]
        if missing:
            raise ValueError(f"The codes have no column {missing[0]!r}; they have {rows.column_names}.")
        if templates and not (label_column or stored_states):
            self.captions = Captions(rows, templates, prompt_cleaning, training)

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
        return {"codes": codes, "caption": self.captions(row, rng)}


class CodeCollator:
    """Turns samples into a batch of tensors, the arguments of
    [`~llamagen_hf.llamagen.training.generator_models.ConditionToCodes`].

    Args:
        tokenize (`Callable`, *optional*): Turns captions into `input_ids` and `attention_mask`.
        condition_length (`int`, *optional*): Positions to which stored states are padded on the left.
        condition_dim (`int`, *optional*): Width of stored states.
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
