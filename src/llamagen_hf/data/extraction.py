"""Code extraction: pictures to code grids, once, before the generator is trained."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch

from ..vq_model import LlamaGenVQModel
from .images import DataConfig, center_crop, random_crop, to_tensor


@dataclass
class CodeExtractionConfig:
    """One run of code extraction.

    Args:
        tokenizer (`str`): Folder or Hub id of the [`LlamaGenVQModel`].
        output_dir (`str`): Folder for `train.parquet` and `test.parquet`.
        num_crops (`int`, *optional*, defaults to 1): Grids a picture: the centre crop, then random ones.
        crop_range (`float`, *optional*, defaults to 1.1): Random crops are cut out of a picture this much larger.
        batch_size (`int`, *optional*, defaults to 64): Pictures encoded at a time.
        seed (`int`, *optional*, defaults to 0): Seed of the random crops.
    """

    tokenizer: str = field(metadata={"help": "Folder or Hub id of the tokenizer."})
    output_dir: str = field(metadata={"help": "Folder for train.parquet and test.parquet."})
    num_crops: int = field(default=1, metadata={"help": "Grids a picture: the centre crop, then random ones."})
    crop_range: float = field(default=1.1, metadata={"help": "Random crops come from a picture this much larger."})
    batch_size: int = field(default=64, metadata={"help": "Pictures encoded at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the random crops."})


def tokenizer_fingerprint(model: LlamaGenVQModel) -> str:
    """What tells one tokenizer's codes from another's: a hash of its codebook and encoder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def extract_codes(data: DataConfig, config: CodeExtractionConfig) -> dict[str, int]:
    """Encode both splits once; each row keeps its columns but the picture and gains `codes` (crops, codes).

    Class labels become their names. The tokenizer's fingerprint goes into the column `tokenizer`.

    Returns:
        `dict[str, int]`: Rows of each split.
    """
    torch.manual_seed(config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaGenVQModel.from_pretrained(config.tokenizer).eval().to(device)
    fingerprint = tokenizer_fingerprint(model)

    def encode(rows):
        crops = [[to_tensor(center_crop(image, data.image_size)) for image in rows[data.image_column]]]
        for _ in range(config.num_crops - 1):
            images = rows[data.image_column]
            crops.append([to_tensor(random_crop(image, data.image_size, config.crop_range)) for image in images])
        codes = [model.encode(torch.stack(images).to(device)).codes.flatten(1).cpu() for images in crops]
        return {
            "codes": torch.stack(codes, dim=1).to(torch.int32).tolist(),
            "tokenizer": [fingerprint] * len(codes[0]),
        }

    output_dir, counts = Path(config.output_dir), {}
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", data.train_split), ("test", data.test_split)):
        rows = data.load(split)
        for column, feature in rows.features.items():
            if isinstance(feature, datasets.ClassLabel):
                names = [feature.int2str(index) for index in rows[column]]
                rows = rows.remove_columns(column).add_column(column, names)
        # The tokenizer decides the result, and the cache can't see its weights.
        rows = rows.map(
            encode,
            batched=True,
            batch_size=config.batch_size,
            remove_columns=data.image_column,
            load_from_cache_file=False,
        )
        partial = output_dir / f"{name}.parquet.partial"
        rows.to_parquet(partial)
        partial.rename(output_dir / f"{name}.parquet")
        counts[name] = len(rows)
    return counts
