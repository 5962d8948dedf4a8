"""Names of files, and files that are written whole or not at all."""

import json
import re
import secrets
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


MAX_BYTES = 100  # of the 255 that a name may have, since numbers, endings and temporary names are added
# Names of devices on Windows, whatever their ending.
RESERVED = re.compile(r"con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]")


def file_stem(text: str) -> str:
    """The words of a text as the beginning of a file name: lower case, with hyphens between them.

    Symbols such as emoji are replaced by their Unicode names. Returns `"image"` if the text has no words.
    """
    text = unicodedata.normalize("NFC", text)
    text = "".join(f" {unicodedata.name(c, '')} " if unicodedata.category(c) == "So" else c for c in text)
    stem = re.sub(r"[\W_]+", "-", text).lower().encode()[:MAX_BYTES].decode(errors="ignore").strip("-") or "image"
    return f"{stem}-image" if RESERVED.fullmatch(stem) else stem


def free_path(stem: str, suffix: str, numbers: Iterable[str] = ("",)) -> Path:
    """The first of `stem`, `stem-2`, `stem-3`, ... in the working directory that does not replace a file.

    Args:
        stem (`str`): Beginning of the name.
        suffix (`str`): Its ending, such as ".png".
        numbers (`Iterable[str]`, *optional*): What is added to the stem for each of several files.
    """
    numbers, count, path = list(numbers), 1, Path(stem + suffix)
    while any(path.with_stem(path.stem + number).exists() for number in numbers):
        count += 1
        path = Path(f"{stem}-{count}{suffix}")
    return path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all: a temporary file takes its place at the end.

    Args:
        path (`str` or `os.PathLike`): The file, replaced if it exists.

    Yields:
        `Path`: The temporary file to write, in the same folder under a hidden name; it is removed after an error.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, value, indent: int | None = 2) -> None:
    """Write a value as JSON, whole or not at all; `indent` as for `json.dumps`."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")


def replace_result(folder: Path, last: str, save: Callable[[Path], None]) -> None:
    """Let `save` write a result to a temporary folder, then move it into `folder` piece by piece.

    The piece named `last` is the one that loading looks for. It is removed before all others and arrives after them,
    so that half a result is never taken for a whole one.

    Args:
        folder (`Path`): Where the result goes; pieces that exist are replaced, others stay.
        last (`str`): Name of the piece that completes the result.
        save (`Callable[[Path], None]`): Writes the result to the folder that it is given, which it creates.
    """
    partial = folder / "partial-result"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    (folder / last).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    partial.rmdir()
