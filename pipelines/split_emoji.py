"""Hold a few emoji out of the training in one of their styles, to see whether styles carry over.

python pipelines/split_emoji.py --dataset ../shared/data/emoji --output runs/emoji/data

The folder gets three splits: `train`, `test` as it was (emoji in no style of `train`), and `unseen_style`. The
latter has 5 % of the training rows: each is an emoji that stays in `train` in at least two other styles.
"""

import argparse
import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path

from datasets import Dataset, load_dataset


SHARE = 0.05
STYLES_LEFT = 2


def unseen_style(rows: Dataset) -> list[int]:
    """Choose the rows to hold out: the same ones of the same rows, at most one of each emoji."""
    names = [f"{code} {style}" for code, style in zip(rows["hexcode"], rows["style"], strict=True)]
    styles, taken, chosen = Counter(rows["hexcode"]), set(), []
    for index in sorted(range(len(rows)), key=lambda index: sha256(names[index].encode()).digest()):
        emoji = names[index].partition(" ")[0]
        if styles[emoji] > STYLES_LEFT and emoji not in taken and len(chosen) < SHARE * len(rows):
            taken.add(emoji)
            chosen.append(index)
    return sorted(chosen)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dataset", default="../shared/data/emoji")
    arguments.add_argument("--output", type=Path, default="runs/emoji/data", help="Replaced, if it is such a folder.")
    own = arguments.parse_args()
    splits = load_dataset(own.dataset)
    held_out = set(unseen_style(splits["train"]))
    parts = {
        "train": splits["train"].select([i for i in range(len(splits["train"])) if i not in held_out]),
        "test": splits["test"],
        "unseen_style": splits["train"].select(sorted(held_out)),
    }
    partial = own.output.with_name(f".{own.output.name}-new")
    shutil.rmtree(partial, ignore_errors=True)
    for split, rows in parts.items():
        rows.to_parquet(partial / "data" / f"{split}-00000-of-00001.parquet")
    if own.output.exists() and not (own.output / "data" / "train-00000-of-00001.parquet").is_file():
        raise SystemExit(f"{own.output} exists and is not a folder of these splits.")
    shutil.rmtree(own.output, ignore_errors=True)
    partial.rename(own.output)
    print({split: len(rows) for split, rows in parts.items()})


if __name__ == "__main__":
    main()
