"""Class names to class ids."""

import difflib
import json
import re

from huggingface_hub import hf_hub_download

from ..arguments import FieldError


def fetch_imagenet_labels() -> dict[int, str]:
    """Names of ImageNet's 1000 classes, from the file on the Hub that transformers' own conversions use.

    Raises:
        OSError: If neither the Hub nor its cache has the file.
    """
    path = hf_hub_download("huggingface/label-files", "imagenet-1k-id2label.json", repo_type="dataset")
    with open(path, encoding="utf-8") as file:
        return {int(index): name for index, name in json.load(file).items()}


def resolve_class_label(label: int | str, num_classes: int, id2label: dict[int, str] | None) -> int:
    """The id of a class given by id or by name.

    Args:
        label (`int` or `str`): An id, or a name of `id2label` in upper or lower case. If a class has several names
            with commas between them, one is enough. A string of digits is an id unless a class has that name.
        num_classes (`int`): Ids go up to `num_classes - 1`.
        id2label (`dict[int, str]`, *optional*): Names.

    Raises:
        FieldError: If there is no such class, or if several have this name. The sentence has the nearest names.
    """
    if not isinstance(label, str):
        if not 0 <= label < num_classes:
            raise FieldError(
                "class_labels",
                f"Class id {label} is out of range; this checkpoint has the classes 0..{num_classes - 1}.",
            )
        return int(label)
    wanted = label.strip().lower()
    is_id = re.fullmatch(r"-?[0-9]+", wanted)
    if not id2label and not is_id:
        raise FieldError(
            "class_labels", f"This checkpoint has no class names, so {label!r} can't be found; pass a class id."
        )
    ids: dict[str, list[int]] = {}
    for index, names in (id2label or {}).items():
        # A set, since a name without commas is its own only part.
        for name in {names.lower(), *(part.strip().lower() for part in names.split(","))}:
            ids.setdefault(name, []).append(int(index))
    found = ids.get(wanted, [])
    if len(found) == 1:
        return found[0]
    if found:
        raise FieldError(
            "class_labels",
            f"Several classes are called {label!r}: {', '.join(map(str, found))}; pass one of these ids.",
        )
    if is_id:
        return resolve_class_label(int(wanted), num_classes, id2label)
    near = difflib.get_close_matches(wanted, ids, n=3)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else "."
    raise FieldError("class_labels", f"There is no class {label!r}{hint}")
