"""Code extraction: images are encoded to code grids once, before the generator is trained."""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, List, Value
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ...arguments import FieldError, check_choices
from ...autoencoders import load_vq_model
from ...conditioning.cache import ImageFeatures, TextFeatures
from ...conditioning.text import PromptCleaning, clean_prompt
from ...data.fingerprint import fingerprint_checkpoint, fingerprint_dataset, vq_model_fingerprint
from ...data.samples import BadRow, BadRows, decode_image
from ...data.shards import claim_shards, shard_path
from ...data.source import DataConfig, files_report
from ...files import replacing, write_json
from ...images.transforms import center_crop, shifted_crop, ten_crop, to_tensor
from ...processes import on_main_process, this_process
from .codes import read_codes_info


logger = get_logger(__name__)

SPLITS = ("train", "test")
INFO = "codes.json"
ROWS_A_WRITE = 512  # rows kept in memory before they are written, and rows of a Parquet row group


@dataclass
class CodeExtractionConfig:
    """Settings of [`extract_codes`]: the recipe's section `codes`.

    `crops` decides which crops of a training image are encoded:

    - `"shifted"`: the centre crop, then `num_crops - 1` random crops, each of an image that is larger by a random
      entry of `crop_ranges`.
    - `"flip"`: the centre crop and its mirror image.
    - `"ten_crop"`: for each entry of `crop_ranges`, the corners and the centre of an image that is larger by it, plain
      and mirrored. The released ImageNet recipe has `[1.1, 1.05]`.
    """

    vq_model: str = field(
        metadata={
            "help": "Folder or Hub id of the image tokenizer, or of a pipeline with one.",
            "aliases": ["--tokenizer"],  # its name in earlier versions
        }
    )
    output_dir: str = field(metadata={"help": "Folder for codes.json, train-00000.parquet, ..., test-00000.parquet."})
    crops: Literal["shifted", "flip", "ten_crop"] = field(
        default="shifted", metadata={"help": "Which crops of an image are encoded."}
    )
    num_crops: int = field(default=1, metadata={"help": "Crops of an image with shifted; 1: the centre crop alone."})
    crop_ranges: list[float] = field(
        default_factory=lambda: [1.1], metadata={"help": "Crops are cut from images this many times larger."}
    )
    batch_size: int = field(default=64, metadata={"help": "Crops encoded at a time, on each process."})
    rows_per_shard: int = field(default=10_000, metadata={"help": "Input rows of one Parquet file."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode images, beside each process."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the image tokenizer."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random crops."})
    text_encoder: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a text encoder whose states are stored too."}
    )
    text_columns: list[str] = field(
        default_factory=list, metadata={"help": "Columns it encodes; their states are stored as COLUMN_states."}
    )
    text_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the text encoder."}
    )
    clip: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a CLIP whose embeddings of the images are stored too, as image_states."
        },
    )
    condition_length: int = field(default=120, metadata={"help": "Positions of a prompt; longer ones are cut."})
    prompt_cleaning: PromptCleaning = field(
        default="unicode", metadata={"help": "How prompts are cleaned; released is for converted checkpoints."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Start over: remove the codes in output_dir first."})

    def __post_init__(self):
        check_choices(self)
        if self.num_crops < 1 or (self.num_crops > 1 and self.crops != "shifted"):
            message = f"num_crops is {self.num_crops}; expected at least 1, and more only if crops is 'shifted'."
            raise FieldError("num_crops", message)
        if not self.crop_ranges or min(self.crop_ranges) < 1:
            raise FieldError("crop_ranges", f"crop_ranges is {self.crop_ranges}; expected numbers of at least 1.")
        if (self.text_encoder is None) != (not self.text_columns):
            raise ValueError("text_encoder and text_columns go together; one of them is missing.")

    @property
    def grids_per_image(self) -> int:
        """Code grids of each training image."""
        return {"shifted": self.num_crops, "flip": 2, "ten_crop": 10 * len(self.crop_ranges)}[self.crops]

    def crop(self, image: Image.Image, size: int, rng: random.Random) -> list[Image.Image]:
        """The crops of a training image, with sides of `size` pixels."""
        if self.crops == "ten_crop":
            return [crop for crop_range in self.crop_ranges for crop in ten_crop(image, size, crop_range)]
        center = center_crop(image, size)
        if self.crops == "flip":
            return [center, ImageOps.mirror(center)]
        others = (shifted_crop(image, size, rng.choice(self.crop_ranges), rng) for _ in range(self.num_crops - 1))
        return [center, *others]


def extract_codes(data: DataConfig, config: CodeExtractionConfig) -> dict[str, dict[str, int]]:
    """Encode the images of both splits, once, into Parquet files of `rows_per_shard` input rows each.

    A row keeps all its columns but the image (class ids keep their names) and gains the columns

    - `codes`: `grids_per_image` lists of int32 codes, row by row of the grid; one list, of the centre crop, in the
      test split;
    - `index`: the row's number in the split;
    - `COLUMN_states` for each of `text_columns`: see [`~llamagen_hf.conditioning.cache.decode_states`]; null where the
      text is null or cleaning leaves nothing of it;
    - `image_states` with `clip`: the same of one position, the embedding of the image, of length 1, see
      [`~llamagen_hf.conditioning.cache.ImageFeatures`].

    Columns of the input with these names are replaced. Rows with a broken or too small image, or without a valid
    class id in `label_column`, are left out; more than `max_bad_rows` of them stop the run.

    `codes.json` records the image tokenizer's fingerprint and all settings that determine the codes. An interrupted
    run resumes at its first incomplete file, if its input is still the same. Several processes divide the files among
    them, each on its own device; each reads a stream from end to end, but decodes only its own part.

    Returns:
        `dict`: `rows` of each split, `bad_rows` of each kind, and `files` of a folder of images; at the end,
        `codes.json` holds them too.

    Raises:
        ValueError: Recipe and data do not fit each other, `output_dir` has codes of other settings or other input and
            `overwrite` is not set, or too many rows can't be used.
    """
    return CodeExtraction(data, config).run()


class CodeExtraction:
    """The models, settings and counters of one [`extract_codes`]."""

    def __init__(self, data: DataConfig, config: CodeExtractionConfig):
        self.data, self.config = data, config
        self.state = this_process()
        self.output_dir = Path(config.output_dir)
        self.bad_rows = BadRows(data.max_bad_rows)
        self.model = load_vq_model(config.vq_model)
        if data.image_size % self.model.downsample_factor:
            raise ValueError(
                f"image_size is {data.image_size}; this tokenizer takes multiples of {self.model.downsample_factor}."
            )
        self.text_features = None
        if config.text_encoder is not None:
            run_in = self.state.device, getattr(torch, config.text_dtype)
            length, cleaning = config.condition_length, config.prompt_cleaning
            self.text_features = TextFeatures(config.text_encoder, length, cleaning, *run_in)
        self.image_features = None if config.clip is None else ImageFeatures(config.clip, self.state.device)
        # Where the input is. It is recorded, but may change between two runs.
        self.places = {"vq_model": config.vq_model, "dataset": data.dataset, "text_encoder": config.text_encoder}
        self.places["clip"] = config.clip
        self.settings = self._settings()  # before the weights are rounded
        self.model.to(self.state.device)
        if config.dtype == "bfloat16":
            self.model.bfloat16()  # `to(dtype)` warns of modules to keep in float32, of which there are none

    def _settings(self) -> dict:
        """The settings that determine the codes, and so must not change within a folder."""
        of_data = ("image_size", "min_image_size", "dataset_config", "train_split", "test_split")
        of_data += ("test_fraction", "split_seed", "image_column", "label_column")
        of_config = ("crops", "num_crops", "crop_ranges", "seed", "dtype", "rows_per_shard")
        of_text = ("text_columns", "text_dtype", "condition_length", "prompt_cleaning")
        side = self.data.image_size // self.model.downsample_factor
        settings = {
            "vq_model_fingerprint": vq_model_fingerprint(self.model),
            "vocab_size": self.model.config.num_vq_embeddings,
            "grid": [side, side],
        }
        settings |= {name: getattr(self.data, name) for name in of_data}
        settings |= {name: getattr(self.config, name) for name in of_config}
        if self.text_features is not None:
            settings |= {name: getattr(self.config, name) for name in of_text} | {"text_dim": self.text_features.dim}
        if self.image_features is not None:
            settings["image_dim"] = self.image_features.dim
        return settings

    def run(self) -> dict[str, dict[str, int]]:
        """Extract both splits; returns the report."""
        splits = {split: self.data.load(split) for split in SPLITS}  # before anything is recorded
        on_main_process(lambda: self.claim_folder(splits))
        for split, rows in splits.items():
            if rows is not None:
                self.extract_split(split, rows)
        self.state.wait_for_everyone()
        report = self.report()
        if self.state.is_main_process:
            write_json(self.output_dir / INFO, self.places | self.settings | report)
        return report

    def claim_folder(self, splits: dict[str, Dataset | IterableDataset | None]) -> None:
        """Begin the codes, or raise a `ValueError` if those in the folder were made otherwise."""
        inputs = fingerprint_dataset(self.data.dataset, self.output_dir, splits.values(), self.data.image_column)
        if self.text_features is not None:
            inputs["the text encoder"] = fingerprint_checkpoint(self.config.text_encoder)
        if self.image_features is not None:
            inputs["the CLIP"] = fingerprint_checkpoint(self.config.clip)
        path, before = self.output_dir / INFO, None
        if path.is_file():
            before = read_codes_info(self.output_dir)
            before = {name: value for name, value in before.items() if name not in ("rows", "bad_rows", "files")}
            if self.config.overwrite:
                write_json(path, before)  # from here on incomplete, but still what the shards belong to
            if before.get("text_encoder"):  # codes that do not say how prompts were cleaned are older than the choice
                before = {"prompt_cleaning": "released"} | before
            before = {name: value for name, value in before.items() if name not in self.places}
        claim_shards(self.output_dir, INFO, before, self.settings, inputs, self.config.overwrite)
        write_json(path, self.places | self.settings)

    def report(self) -> dict[str, dict[str, int]]:
        """The numbers of rows in the files of all processes."""
        counts = dict.fromkeys(SPLITS, 0)
        for split in SPLITS:
            for path in sorted(self.output_dir.glob(f"{split}-*.parquet")):
                counts[split] += pq.read_metadata(path).num_rows
                self.count_bad_rows(split, path)  # those of other processes too
        return {"rows": counts, "bad_rows": self.bad_rows.report()} | files_report(self.data.dataset)

    def count_bad_rows(self, split: str, path: Path) -> None:
        """Count the rows that were left out of a file."""
        for index, reason in json.loads(pq.read_metadata(path).metadata[b"bad_rows"]):
            self.bad_rows.add(index, reason, split)

    def extract_split(self, split: str, rows: Dataset | IterableDataset) -> None:
        """Write the files of a split that are missing and this process's."""
        added = Features(codes=List(List(Value("int32"))), index=Value("int64"))
        for column in self.config.text_columns:
            if rows.features.get(column) not in (Value("string"), Value("large_string")):
                raise ValueError(f"text_columns has {column!r}, not a text column; there are {list(rows.features)}.")
            added[f"{column}_states"] = Value("binary")
        if self.image_features is not None:
            added["image_states"] = Value("binary")
        # `__url__` is the path of WebDataset's tar file on this machine.
        left_out = (self.data.image_column, "__url__")
        kept = Features({name: feature for name, feature in rows.features.items() if name not in left_out})
        names = self.data.label_names(rows)
        num_classes = math.inf if names is None else len(names)
        for number, (images, columns) in enumerate(self.parts(rows, kept)):
            path = shard_path(self.output_dir, number, split)
            if path.is_file():
                self.count_bad_rows(split, path)
            elif number % self.state.num_processes == self.state.process_index:
                first = number * self.config.rows_per_shard
                read = None if self.image_features is None else self.image_features.read
                part = ImageCrops(images, columns, split, first, num_classes, self.data, self.config, read)
                self.write_part(path, part, Features(kept | added).arrow_schema)

    def parts(self, rows: Dataset | IterableDataset, kept: Features) -> Iterator[tuple[Sequence, pa.Table]]:
        """Yield the images and the `kept` columns of the next `rows_per_shard` rows."""
        image_column, size = self.data.image_column, self.config.rows_per_shard
        if isinstance(rows, Dataset):
            for start in range(0, len(rows), size):
                part = rows.select(range(start, min(start + size, len(rows))))
                # A table without columns has no rows either, and the positions of images are taken from it.
                columns = part.select_columns(list(kept)).with_format("arrow")[:] if kept else pa.table({})
                yield part[image_column], columns
            return
        stream = iter(rows.decode(False))  # images in other columns stay files too
        while part := list(islice(stream, size)):
            columns = {name: [row[name] for row in part] for name in kept}
            yield [row[image_column] for row in part], pa.Table.from_pydict(columns, schema=kept.arrow_schema)

    def write_part(self, path: Path, part: "ImageCrops", schema: pa.Schema) -> None:
        """Encode rows into one file, which appears only once it is complete."""
        loader = DataLoader(
            part,
            batch_size=max(1, self.config.batch_size // self.config.grids_per_image),
            num_workers=self.config.num_workers,
            collate_fn=stack_crops,
        )
        bad, waiting = [], []
        with replacing(path) as partial, pq.ParquetWriter(partial, schema) as writer:
            for positions, crops, pixels, faults in loader:
                for position, reason in faults:
                    bad.append((part.first + position, reason))
                    self.bad_rows.add(*bad[-1], part.split)
                if positions:
                    waiting.append(self.encode(part, positions, crops, pixels, schema))
                if sum(len(table) for table in waiting) >= ROWS_A_WRITE:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
            writer.add_key_value_metadata({"bad_rows": json.dumps(bad)})
        logger.info(f"{path}: {len(part) - len(bad)} rows", main_process_only=False)

    @torch.no_grad()
    def encode(
        self,
        part: "ImageCrops",
        positions: list[int],
        crops: torch.Tensor,
        pixels: torch.Tensor | None,
        schema: pa.Schema,
    ) -> pa.Table:
        """Rows as they are stored: those at `positions` of `part`, their `crops` as codes, `pixels` as embeddings."""
        codes = self.model.encode(crops.to(self.model.device, self.model.dtype)).codes
        codes = codes.view(len(positions), -1, codes.shape[1] * codes.shape[2]).int().cpu().numpy()
        columns = {name: part.columns[name].take(positions) for name in part.columns.column_names}
        columns["codes"] = [list(grids) for grids in codes]
        columns["index"] = [part.first + position for position in positions]
        for name in self.config.text_columns:
            texts = self.readable(columns[name].to_pylist())
            present = [text for text in texts if text is not None]
            states = iter(self.text_features.encode(present) if present else [])
            columns[f"{name}_states"] = [None if text is None else next(states) for text in texts]
        if pixels is not None:
            columns["image_states"] = self.image_features.encode(pixels)
        return pa.Table.from_pydict(columns, schema=schema)

    def readable(self, texts: list[str | None]) -> list[str | None]:
        """The texts, with `None` for those of which cleaning leaves nothing."""
        cleaning = self.config.prompt_cleaning
        kept = [text if not text or clean_prompt(text, cleaning) else None for text in texts]
        if lost := kept.count(None) - texts.count(None):
            logger.warning(f"Cleaning leaves nothing of {lost} texts: they become null.", main_process_only=False)
        return kept


@dataclass(eq=False)
class ImageCrops(TorchDataset):
    """Consecutive rows of a split, from number `first` on: their images as crops, and as `read` does, on access.

    The random crops of a row depend on seed, split and number only, not on the process or on where a run went on.
    """

    images: Sequence
    columns: pa.Table
    split: str
    first: int
    num_classes: float
    data: DataConfig
    config: CodeExtractionConfig
    read: Callable[[Image.Image], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[int, torch.Tensor | str, torch.Tensor | None]:
        """The position, `(crops, 3, size, size)` in [-1, 1] or why the row can't be used, and what a CLIP reads."""
        rng = random.Random(f"{self.config.seed}-{self.split}-{self.first + position}")
        try:
            if self.data.label_column is not None:
                label = self.columns[self.data.label_column][position].as_py()
                if label is None or not 0 <= label < self.num_classes:
                    raise BadRow(f"no valid class id: {self.data.label_column} is {label}")
            image = decode_image(self.images[position], self.data.min_image_size)
        except BadRow as error:
            return position, str(error), None
        size = self.data.image_size
        crops = self.config.crop(image, size, rng) if self.split == "train" else [center_crop(image, size)]
        crops = torch.stack([to_tensor(crop) for crop in crops])
        return position, crops, None if self.read is None else self.read(image)


def stack_crops(
    items: list[tuple],
) -> tuple[list[int], torch.Tensor | None, torch.Tensor | None, list[tuple[int, str]]]:
    """Positions of the usable rows, all their crops in one tensor, what a CLIP reads, and the other rows' faults."""
    faults = [(position, crops) for position, crops, _ in items if isinstance(crops, str)]
    usable = [item for item in items if not isinstance(item[1], str)]
    if not usable:
        return [], None, None, faults
    positions, crops, pixels = zip(*usable, strict=True)
    return list(positions), torch.cat(crops), None if pixels[0] is None else torch.stack(pixels), faults
