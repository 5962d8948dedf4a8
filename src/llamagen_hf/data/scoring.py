"""Scoring: CLIP similarity and aesthetic score of rows that lack them, so that they can be filtered."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from datasets import Value
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, CLIPModel

from ..clip import embed_images, embed_texts
from ..loading.checkpoint import align_weights
from ..processes import on_main_process, this_process
from .fingerprint import hash_file
from .shards import StageConfig, add_columns, decode_batches, fingerprint_inputs, open_folder, open_rows


# Linear layers of LAION's aesthetic predictors: one in the first version (LAION-AI/aesthetic-predictor), five with
# nothing but dropout between them in the second (linearMSE of christophschuhmann/improved-aesthetic-predictor).
AESTHETIC_LAYERS = ([""], ["layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7."])


@dataclass
class ScoreConfig(StageConfig):
    """One run of [`score`]: the recipe's section `score`, beside the settings of [`StageConfig`]."""

    scores: list[str] = field(
        default_factory=lambda: ["similarity", "aesthetic"], metadata={"help": "What to fill: similarity, aesthetic."}
    )
    model: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={"help": "Folder or Hub id of a CLIP model; similarities of different models can't be compared."},
    )
    aesthetic_head: str = field(
        default="ttj/sac-logos-ava1-l14-linearMSE/model.safetensors",
        metadata={"help": "LAION's predictor for this CLIP model: a .safetensors or .pth file, or owner/name/file."},
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    caption_column: str = field(default="caption", metadata={"help": "Column with the texts to compare with."})
    similarity_column: str = field(default="similarity", metadata={"help": "Column for CLIP similarities."})
    aesthetic_column: str = field(default="aesthetic", metadata={"help": "Column for aesthetic scores."})
    batch_size: int = field(default=64, metadata={"help": "Images scored at a time."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "What the CLIP model runs in."}
    )


def score(config: ScoreConfig) -> dict:
    """Fill in CLIP similarities and aesthetic scores where they are null or NaN; missing columns are added.

    The similarity is the cosine between CLIP's embeddings of image and text; a text longer than CLIP's context is cut.
    The aesthetic score is that of a linear head on the normalized embedding of the image; LAION's heads are trained on
    ratings from 1 to 10. If an image can't be decoded, its row keeps its null, as does the similarity of a row without
    text. Resuming and sharing out shards to processes work as in [`~llamagen_hf.data.recaptioning.recaption`].

    Returns:
        `dict`: `shards`, `rows`, `undecodable` images among those needed, for each score how many were computed and
        how many are still missing, and `files` of a folder of images.

    Raises:
        ValueError: If the dataset, a column, the aesthetic head or the output folder does not fit.
    """
    columns = {"similarity": config.similarity_column, "aesthetic": config.aesthetic_column}
    for name in config.scores:
        if name not in columns:
            raise ValueError(f"There is no score {name!r}; `scores` takes similarity and aesthetic.")
    columns = {name: columns[name] for name in config.scores}
    rows = open_rows(config, [config.image_column] + [config.caption_column] * ("similarity" in columns))
    processor = AutoProcessor.from_pretrained(config.model)

    def inputs():
        found = fingerprint_inputs(config, rows)
        if "aesthetic" in columns:
            found["the aesthetic head"] = hash_file(find_aesthetic_head(config.aesthetic_head))
        return found

    on_main_process(lambda: open_folder(config, inputs()))
    device = this_process().device
    model = CLIPModel.from_pretrained(config.model, dtype=config.dtype).eval().to(device)
    align_weights(model)
    if "aesthetic" in columns:
        head = load_aesthetic_head(config.aesthetic_head, model.config.projection_dim).to(device)

    @torch.no_grad()
    def fill(shard):
        cells, texts = shard[config.image_column], shard.get(config.caption_column)
        values, wanted, embedded = {}, {}, {}
        for name, column in columns.items():
            found = shard.get(column, [None] * len(cells))
            values[name] = [None if value is None or math.isnan(value) else value for value in found]
            wanted[name] = [i for i, value in enumerate(values[name]) if value is None]
            if name == "similarity":
                wanted[name] = [i for i in wanted[name] if texts[i] is not None]
        needed = sorted(set().union(*wanted.values()))
        for indices, images in decode_batches(cells, needed, config.batch_size):
            embedded |= zip(indices, embed_images(model, processor, images), strict=True)
        counts = {"undecodable": len(needed) - len(embedded)}
        for name in columns:
            chosen = [i for i in wanted[name] if i in embedded]
            for start in range(0, len(chosen), config.batch_size):
                batch = chosen[start : start + config.batch_size]
                embeddings = torch.stack([embedded[i] for i in batch])
                if name == "similarity":
                    scores = (embeddings * embed_texts(model, processor, [texts[i] for i in batch])).sum(-1)
                else:
                    scores = head(embeddings).squeeze(-1)
                for i, value in zip(batch, scores.tolist(), strict=True):
                    values[name][i] = value
            counts[f"{name}_computed"] = len(chosen)
            counts[f"{name}_missing"] = values[name].count(None)
        return {column: values[name] for name, column in columns.items()}, counts

    features = {}
    for column in columns.values():
        found = rows.features.get(column, Value("null"))
        features[column] = Value("float32") if found == Value("null") else found
    return add_columns(config, rows, features, fill)


def find_aesthetic_head(source: str) -> Path:
    """The file of a predictor, downloaded if necessary; arguments and errors as for [`load_aesthetic_head`]."""
    path, parts = Path(source).expanduser(), source.split("/", 2)
    if path.is_file():
        return path
    if len(parts) < 3 or source[0] in "./~":
        raise ValueError(f"There is no file {source!r}; aesthetic_head takes a file, or owner/name/file on the Hub.")
    return Path(hf_hub_download("/".join(parts[:2]), parts[2]))


def load_aesthetic_head(source: str, width: int) -> nn.Sequential:
    """Load one of LAION's aesthetic predictors: linear layers from a CLIP embedding to a score.

    Args:
        source (`str`): A `.safetensors` or `.pth` file, or one on the Hub as `owner/name/file`.
        width (`int`): Width of the CLIP embeddings.

    Returns:
        `torch.nn.Sequential`: From normalized embeddings (n, width) to scores (n, 1).

    Raises:
        ValueError: If there is no such file, or if it is another model or for embeddings of another width.
    """
    path = find_aesthetic_head(source)
    is_safe = path.suffix == ".safetensors"
    weights = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    for prefixes in AESTHETIC_LAYERS:
        if set(weights) == {f"{prefix}{kind}" for prefix in prefixes for kind in ("weight", "bias")}:
            break
    else:
        raise ValueError(f"{source} is not one of LAION's linear aesthetic predictors; it holds {', '.join(weights)}.")
    layers = nn.Sequential()
    for prefix in prefixes:
        layer = nn.Linear(*reversed(weights[f"{prefix}weight"].shape))
        layer.load_state_dict({kind: weights[f"{prefix}{kind}"] for kind in ("weight", "bias")})
        layers.append(layer)
    if layers[0].in_features != width:
        raise ValueError(f"{source} is for embeddings of width {layers[0].in_features}, but CLIP's have {width}.")
    return layers.eval()
