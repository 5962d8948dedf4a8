"""Image files of a folder: the same ones for training, preparation and evaluation."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .avif .avifs .heic .heif .hif .jp2 .j2k .jpx "
    ".ppm .pgm .pbm .pnm .pfm .tga .pcx .sgi .psd .qoi .ico .dds".split()
)
# What file managers, disk stations and archivers leave in folders of images, besides names that begin with a dot.
FOREIGN_FOLDERS = ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")


@dataclass
class FoundFiles:
    """What [`find_files`] found; all paths are relative to the folder, with `/`, and sorted.

    Attributes:
        images (`list[str]`): Image files, by their suffix in either case.
        others (`list[str]`): All other files.
        left_out (`Counter`): Files and folders that were not looked at, by reason.
    """

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


def find_files(folder: str | Path) -> FoundFiles:
    """List a folder with all folders in it, also those that are links.

    Hidden files and folders (`.DS_Store`, `._a.png`, `.ipynb_checkpoints`, `__MACOSX`, `@eaDir`) are left out.

    Raises:
        OSError: If the folder itself can't be listed.
    """
    found, waiting = FoundFiles(), [(os.fspath(folder), "", (os.path.realpath(folder),))]
    while waiting:
        path, prefix, above = waiting.pop()
        try:
            entries = list(os.scandir(path))
        except OSError:
            if not prefix:
                raise
            found.left_out["folder can't be opened"] += 1
            continue
        for entry in entries:
            is_folder = entry.is_dir()
            if not _is_text(entry.name):
                found.left_out["name that is not UTF-8"] += 1
            elif entry.name.startswith(".") or (is_folder and entry.name.startswith(("__", *FOREIGN_FOLDERS))):
                found.left_out["hidden"] += 1
            elif is_folder:
                real = os.path.realpath(entry.path)
                if any(Path(folder).is_relative_to(real) for folder in above):
                    found.left_out["link to a folder around it"] += 1
                else:
                    waiting.append((entry.path, f"{prefix}{entry.name}/", (*above, real)))
            elif not entry.is_file():
                found.left_out["broken link" if entry.is_symlink() else "no file"] += 1
            elif suffix(entry.name) in SUFFIXES:
                found.images.append(prefix + entry.name)
            else:
                found.others.append(prefix + entry.name)
    found.images.sort()
    found.others.sort()
    return found


def _is_text(name: str) -> bool:
    """Whether a name can be written to a table."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def suffix(path: str) -> str:
    """The suffix of a file in lower case."""
    return os.path.splitext(path)[1].lower()


def count_others(others: list[str]) -> Counter:
    """Files that are no images, counted as reasons to be left out."""
    return Counter(f"no image ({suffix(path) or 'without a suffix'})" for path in others)


def in_words(left_out: Counter) -> str:
    """What was left out, for a log: `2 hidden, 1 no image (.txt)`."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.most_common()) or "nothing"
