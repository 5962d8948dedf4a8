"""Paths of this machine: what stands in their place in public files, and a search for them there."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image
from safetensors import safe_open


# Keys of settings that say where something was loaded from.
SOURCE_KEYS = (
    "_name_or_path", "name_or_path", "base_model_name_or_path", "dataset", "vq_model", "tokenizer", "text_encoder",
    "init_from", "teacher", "low_vq_model", "clip",
)  # fmt: skip


def is_hub_id(source: str | None) -> bool:
    """Whether `source` has the form `owner/name` of a Hub id and is not a path that exists here."""
    return bool(source and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)) and not Path(source).exists()


def public_name(source: str) -> str:
    """A Hub id as it is; of a folder, a file or a pattern of this machine the last name alone."""
    return source if not source or is_hub_id(source) else os.path.basename(os.path.abspath(source))


def unless_folder(source: str | Path) -> str | None:
    """A checkpoint's Hub id, as it may be published; `None` for a folder of this machine."""
    return None if Path(source).is_dir() else str(source)


def public_sources(settings: dict) -> dict:
    """Settings with [`public_name`]s where they say where something was loaded from."""
    return {
        key: public_name(value) if key in SOURCE_KEYS and isinstance(value, str) else value
        for key, value in settings.items()
    }


def local_places(folder: Path) -> list[str]:
    """Folders that no public file should name: the one around `folder`, home, the working and the temporary folder."""
    places = {str(folder.resolve().parent), str(Path.home()), str(Path.cwd()), tempfile.gettempdir()}
    return sorted((place for place in places if len(place) > 1), key=len, reverse=True)  # the longest is found first


def find_local_path(texts: Iterable[str], places: list[str]) -> str | None:
    """The first of `places` that a text names; `None` if none is named.

    A place at the top, such as /tmp, must be followed by the name of something in it, since vocabularies of tokenizers
    hold words like that.
    """
    names = [re.escape(place) + (r"(?![\w-])" if place.count("/") > 1 else r"(?=/[\w.~-])") for place in places]
    pattern = re.compile(rf"(?<![\w.-])(?:{'|'.join(names)})")
    matches = (pattern.search(text.replace("\\n", "\n")) for text in texts)
    return next((match[0] for match in matches if match), None)


def read_texts(path: Path) -> Iterator[str]:
    """The readable text of a file: metadata of weights and images, strings of tables, all of any other file."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            yield str(file.metadata() or "")
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()  # text may follow the pixels
            yield str(image.info)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            yield str(file.metadata.metadata or "")
            leaves = [file.schema.column(i) for i in range(len(file.schema))]
            if columns := [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]:
                for batch in file.iter_batches(columns=columns):
                    yield str(batch.to_pylist())
    else:
        yield path.read_bytes().decode("utf-8", "replace")


def public_value(value, places: list[str]):
    """A value of JSON in which paths of this machine are replaced by their last names, see [`public_text`]."""
    if isinstance(value, dict):
        return {public_value(key, places): public_value(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [public_value(item, places) for item in value]
    return public_text(value, places) if isinstance(value, str) else value


def public_text(text: str, places: list[str]) -> str:
    """A text in which paths below `places`, or a path that is all of the text, are replaced by their last names."""
    if re.match(r"(/|~/|\./|\.\./|[A-Za-z]:\\)\S*$", text):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    inside = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    return re.sub(rf"({inside})(/[^\s'\"`,;:]*)?(?![\w.-])", lambda found: Path(found[0]).name, text)
