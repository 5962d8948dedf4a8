"""Paths of this machine: names in place of them, and a search for them in files that go to the Hub."""

import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image
from safetensors import safe_open


def public_name(source: str) -> str:
    """A Hub id as it is; of a folder, a file or a pattern of this machine the last name alone."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() and source[0] != ".":
        return source
    return Path(source).name


def local_places(folder: Path) -> list[str]:
    """Folders whose names are of interest on this machine only: around `folder`, at home, here, temporary ones."""
    places = {str(folder.resolve().parent), str(Path.home()), str(Path.cwd()), tempfile.gettempdir()}
    return sorted((place for place in places if len(place) > 1), key=len, reverse=True)  # the longest is named


def find_local_path(texts: Iterable[str], places: list[str]) -> str | None:
    """The first of `places` that is named in a text, `None` if none is.

    A place at the top, such as /tmp, must be followed by the name of something in it: vocabularies of tokenizers hold
    words like that.
    """
    names = [re.escape(place) + (r"(?![\w-])" if place.count("/") > 1 else r"(?=/[\w.~-])") for place in places]
    pattern = re.compile(rf"(?<![\w.-])(?:{'|'.join(names)})")
    matches = (pattern.search(text.replace("\\n", "\n")) for text in texts)
    return next((match[0] for match in matches if match), None)


def read_texts(path: Path) -> Iterator[str]:
    """What people could read in a file: metadata of weights and images, strings of tables, all of others."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            yield str(file.metadata() or "")
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()  # text may stand behind the pixels
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
    """A value of JSON in which what lies in one of some folders goes by its last name."""
    if isinstance(value, dict):
        return {public_value(key, places): public_value(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [public_value(item, places) for item in value]
    return public_text(value, places) if isinstance(value, str) else value


def public_text(text: str, places: list[str]) -> str:
    """A text in which paths of this machine are names."""
    if re.match(r"(/|~/|\./|\.\./|[A-Za-z]:\\)\S*$", text):  # nothing but a path
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    inside = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    return re.sub(rf"({inside})(/[^\s'\"`,;:]*)?(?![\w.-])", lambda found: Path(found[0]).name, text)
