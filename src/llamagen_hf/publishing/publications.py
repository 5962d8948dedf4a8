"""What can be published: pipelines, LoRA adapters and codes, and which of their files go up."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import UnidentifiedImageError
from safetensors import SafetensorError

from ..evaluation.report import REPORT_FILES
from ..families import Family, find_family
from ..local_paths import find_local_path, local_places, public_name, read_texts
from ..training.record import FACTS_FILE


SHEET = "contact_sheet.png"
MAX_SHEET_BYTES = 2_000_000
# What belongs to a component that diffusers or transformers saved.
COMPONENT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# Where a component notes from where it was loaded.
PATH_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "dataset", "vq_model", "text_encoder")
PATH_KEYS += ("tokenizer",)  # the key of codes.json in earlier versions


@dataclass
class Publication:
    """A folder that can be published.

    Args:
        folder (`Path`): Where it is.
        kind (`str`): `"pipeline"`, `"adapter"` or `"codes"`.
        files (`dict[str, Path | bytes]`): What goes up, by its path in the repository.
    """

    folder: Path
    kind: str
    files: dict[str, Path | bytes] = field(default_factory=dict)

    @property
    def repo_type(self) -> str:
        """Of the repository: `"model"` or `"dataset"`."""
        return "dataset" if self.kind == "codes" else "model"

    @property
    def family(self) -> Family | None:
        """That of a pipeline."""
        return find_family(self.json("model_index.json").get("_class_name"))

    @property
    def marker(self) -> str:
        """The file by which this kind is known, in a folder and in a repository."""
        return MARKERS[self.kind]

    def add(self, name: str, text: str) -> None:
        """Take a text along; an `OSError` if it names a folder of this machine."""
        self.check(name, [text])
        self.files[name] = text.encode()

    def check(self, name: str, texts: Iterable[str]) -> None:
        """Raise an `OSError` if the texts of a file name a folder of this machine."""
        if found := find_local_path(texts, local_places(self.folder)):
            raise OSError(f"{name} holds the path {found!r} of this machine; remove it, then publish again.")

    def json(self, name: str) -> dict:
        """A JSON file as it goes up, else of the folder; empty if there is none."""
        if isinstance(content := self.files.get(name), bytes):
            return json.loads(content)
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def owns(self, path: str) -> bool:
        """Whether a file of the repository is of the sort that goes up, and so goes away when it is gone here."""
        if path.endswith(".gitattributes"):
            return False
        if self.kind == "codes":
            return path.endswith(".parquet") and "/" not in path
        return path.endswith((".json", ".safetensors")) or path in (SHEET, *REPORT_FILES)


MARKERS = {"pipeline": "model_index.json", "adapter": "adapter_config.json", "codes": "codes.json"}


def open_publication(folder: str | Path) -> Publication:
    """Find out what a folder holds and which of its files to publish.

    Args:
        folder (`str` or `os.PathLike`): A pipeline, an adapter, or codes, as this package's trainings and
            `save_pretrained` write them.

    Returns:
        [`Publication`]: With all its files but the card. Settings in JSON are freed of paths of this machine.

    Raises:
        OSError: In one sentence, if it is none of these, is incomplete, or if a file still holds such a path.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"There is no folder {str(folder)!r}.")
    kind = next((kind for kind, marker in MARKERS.items() if (folder / marker).is_file()), None)
    if kind is None:
        raise OSError(
            f"{str(folder)!r} can't be published: it is no pipeline (model_index.json), no adapter "
            "(adapter_config.json) and no codes (codes.json)."
        )
    publication = Publication(folder, kind)
    paths = {"pipeline": pipeline_files, "adapter": adapter_files, "codes": codes_files}[kind](publication)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            publication.add(name, without_paths(path))
            continue
        try:
            publication.check(name, read_texts(path))
        except (SafetensorError, UnidentifiedImageError, ValueError) as error:  # pyarrow's are ValueErrors
            raise OSError(f"A file of {str(folder)!r} is damaged: {name}.") from error
        publication.files[name] = path
    return publication


def pipeline_files(publication: Publication) -> list[Path]:
    folder, index = publication.folder, publication.json("model_index.json")
    if publication.family is None:
        raise OSError(f"{str(folder)!r} holds another pipeline, of class {index.get('_class_name')!r}.")
    components = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    paths = [folder / name for name in ("model_index.json", FACTS_FILE, SHEET, *REPORT_FILES)]
    for name in components:
        if not (folder / name).is_dir():
            raise OSError(f"{str(folder)!r} is incomplete: there is no {name}.")
        paths += [path for pattern in COMPONENT_FILES for path in sorted((folder / name).glob(pattern))]
    return [path for path in paths if path.is_file()]


def adapter_files(publication: Publication) -> list[Path]:
    weights = publication.folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise OSError(f"{str(publication.folder)!r} is incomplete: there is no adapter_model.safetensors.")
    others = [publication.folder / name for name in (FACTS_FILE, SHEET, *REPORT_FILES)]
    return [publication.folder / "adapter_config.json", weights, *(path for path in others if path.is_file())]


def codes_files(publication: Publication) -> list[Path]:
    if "rows" not in publication.json("codes.json"):
        raise OSError(f"The codes in {str(publication.folder)!r} are incomplete; extract_codes goes on with them.")
    return [publication.folder / "codes.json", *sorted(publication.folder.glob("*-[0-9]*.parquet"))]


def without_paths(path: Path) -> str:
    """The text of a JSON file, with Hub ids and bare names where it says where something was loaded from."""
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise OSError(f"{path.name} is damaged: {error}.") from error
    if not isinstance(content, dict):
        return text
    changed = {
        key: public_name(value)
        for key, value in content.items()
        if key in PATH_KEYS and isinstance(value, str) and public_name(value) != value
    }
    return json.dumps(content | changed, indent=2, ensure_ascii=False) if changed else text
