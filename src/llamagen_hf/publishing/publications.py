"""What can be published: pipelines, models, LoRA adapters, codes, and which of their files are uploaded."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import UnidentifiedImageError
from safetensors import SafetensorError

from ..evaluation.report import REPORT_FILES
from ..families import FAMILIES, MODELS, Family, Method, find_family, find_model_family, model_class_name
from ..loading.components import component_folders
from ..local_paths import find_local_path, local_places, public_sources, read_texts
from ..training.record import FACTS_FILE


SHEET = "contact_sheet.png"
# The file by which each kind is known, in a folder and in a repository.
MARKERS = {
    "pipeline": "model_index.json",
    "adapter": "adapter_config.json",
    "codes": "codes.json",
    "model": "config.json",
}
# Files that diffusers and transformers save for a component.
COMPONENT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# The same for a model that stands by itself, in whose folder there may be notes.
MODEL_FILES = ("*.json", "*.safetensors", "merges.txt", "vocab.txt")


@dataclass
class Publication:
    """A folder that can be published.

    Args:
        folder (`Path`): The folder.
        kind (`str`): `"pipeline"`, `"adapter"`, `"codes"`, or `"model"` for a CLIP or a classifier.
        family ([`~llamagen_hf.families.Method`]): The family of the pipeline or model, or the one that an adapter or
            codes are for.
        files (`dict[str, Path | bytes]`): What is uploaded, by its path in the repository.
    """

    folder: Path
    kind: Literal["pipeline", "adapter", "codes", "model"]
    family: Method = FAMILIES[0]
    files: dict[str, Path | bytes] = field(default_factory=dict)

    @property
    def draws_images(self) -> bool:
        """Whether it is a pipeline that draws images, for a sample sheet or a Space."""
        return isinstance(self.family, Family) and self.kind == "pipeline" and self.family.draws == "images"

    @property
    def repo_type(self) -> Literal["model", "dataset"]:
        """The type of the repository."""
        return "dataset" if self.kind == "codes" else "model"

    def add(self, name: str, text: str) -> None:
        """Add a text file; an `OSError` if it names a folder of this machine."""
        self.check(name, [text])
        self.files[name] = text.encode()

    def check(self, name: str, texts: Iterable[str]) -> None:
        """Raise an `OSError` if the texts of a file name a folder of this machine."""
        if found := find_local_path(texts, local_places(self.folder)):
            raise OSError(f"{name} holds the path {found!r} of this machine; remove it, then publish again.")

    def json(self, name: str) -> dict:
        """A JSON file as it is uploaded, else as it is in the folder; empty if there is none."""
        if isinstance(content := self.files.get(name), bytes):
            return json.loads(content)
        path = self.folder / name
        return read_json(path) if path.is_file() else {}

    @property
    def facts(self) -> dict[str, dict]:
        """What the trainings behind it recorded, by folder: `""`, or those of the parts, such as `"upsampler"`."""
        folders = [name.rpartition("/")[0] for name in self.files if PurePosixPath(name).name == FACTS_FILE]
        return {folder: self.json(f"{folder}/{FACTS_FILE}".lstrip("/")) for folder in sorted(folders)}

    def owns(self, path: str) -> bool:
        """Whether publishing uploads files like this one, and so deletes it there once it is deleted here."""
        if path.endswith(".gitattributes"):
            return False
        if self.kind == "codes":
            return path.endswith(".parquet") and "/" not in path
        return path.endswith((".json", ".safetensors")) or path in (SHEET, *REPORT_FILES)


def open_publication(folder: str | Path) -> Publication:
    """Find out what a folder holds and which of its files to publish.

    Args:
        folder (`str` or `os.PathLike`): A pipeline, a CLIP, a classifier of noisy images, an adapter, or codes, as
            this package's trainings and `save_pretrained` write them.

    Returns:
        [`Publication`]: All its files but the card. In JSON files, names stand in place of local paths.

    Raises:
        OSError: If the folder is none of these, is incomplete, or if a file still holds a path of this machine.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"There is no folder {str(folder)!r}.")
    kind = next((kind for kind, marker in MARKERS.items() if (folder / marker).is_file()), None)
    if kind is None:
        raise OSError(
            f"{str(folder)!r} can't be published: it is not a pipeline (model_index.json), a CLIP or a classifier "
            "(config.json), an adapter (adapter_config.json) or codes (codes.json)."
        )
    publication = Publication(folder, kind)
    for path in list_files(publication):
        name = path.relative_to(folder).as_posix()
        try:
            if path.suffix == ".json":
                publication.add(name, public_json(path))
            else:
                publication.check(name, read_texts(path))
                publication.files[name] = path
        except (SafetensorError, UnidentifiedImageError, ValueError) as error:  # pyarrow's are ValueErrors
            raise OSError(f"A file of {str(folder)!r} is damaged: {name}.") from error
    if kind == "adapter":
        sections = {section for facts in publication.facts.values() for section in facts}
        publication.family = next((family for family in FAMILIES if family.record in sections), publication.family)
    return publication


def list_files(publication: Publication) -> list[Path]:
    """The files to publish; an `OSError` if one is missing."""
    folder, marker = publication.folder, publication.json(MARKERS[publication.kind])
    if publication.kind == "codes":
        if "rows" not in marker:
            raise OSError(f"The codes in {str(folder)!r} are incomplete; extract_codes finishes them.")
        return [folder / "codes.json", *sorted(folder.glob("*-[0-9]*.parquet"))]
    if publication.kind == "model":
        return list_model_files(publication, marker)
    needed, patterns = ["adapter_model.safetensors"], ["adapter_model.safetensors"]
    if publication.kind == "pipeline":
        publication.family = find_family(marker.get("_class_name"))
        if publication.family is None:
            raise OSError(f"{str(folder)!r} holds another pipeline, of class {marker.get('_class_name')!r}.")
        needed = component_folders(folder, marker)
        patterns = [f"{name}/{pattern}" for name in needed for pattern in COMPONENT_FILES]
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise OSError(f"{str(folder)!r} is incomplete: there is no {missing[0]}.")
    patterns += [MARKERS[publication.kind], FACTS_FILE, SHEET, *REPORT_FILES]
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def list_model_files(publication: Publication, config: dict) -> list[Path]:
    """The same of a model that is no pipeline."""
    folder, family = publication.folder, find_model_family(config)
    if family is None:
        known = " and ".join(each.model for each in MODELS)
        raise OSError(
            f"{str(folder)!r} can't be published: it is a model of class {model_class_name(config)!r}; of models by "
            f"themselves only {known} can."
        )
    publication.family = family
    if not any(folder.glob("*.safetensors")):
        raise OSError(f"{str(folder)!r} is incomplete: there are no weights (*.safetensors).")
    return [path for pattern in (*MODEL_FILES, *REPORT_FILES) for path in sorted(folder.glob(pattern))]


def public_json(path: Path) -> str:
    """The text of a JSON file, with names in place of the paths from which something was loaded."""
    text, content = path.read_text(encoding="utf-8"), read_json(path)
    if not isinstance(content, dict) or (public := public_sources(content)) == content:
        return text
    return json.dumps(public, indent=2, ensure_ascii=False)


def read_json(path: Path):
    """The content of a JSON file; an `OSError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path.name} is damaged: {error}.") from error
