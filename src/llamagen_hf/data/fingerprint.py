"""Fingerprints of what a stage reads: the files of a dataset, the weights of a model.

A stage that can go on where it stopped keeps the fingerprints of its input beside its results, in `.inputs.json`. It
goes on with the same input, even if that was moved, and refuses another one with a sentence that names what changed.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..files import write_json
from ..images.reading import SUFFIXES, find_files


logger = logging.getLogger(__name__)

INPUTS_FILE = ".inputs.json"  # hidden, so that load_dataset skips it, and nothing publishes it
HASHED_BYTES = 2**30  # read within seconds; files of more than that in total are compared by size and time
NOT_READ = re.compile(r"Thumbs\.db|desktop\.ini|\..*|.*\.md", re.IGNORECASE)
NAMED = 3  # files in a sentence
# Names that earlier versions used.
RENAMED = {"the pictures that the dataset names": "the images that the dataset names"}

# For each thing that is read, a hash or a revision; for files, the size, time and hash of each.
Inputs = dict[str, str | None | dict[str, list | None]]


def fingerprint_files(files: Mapping[str, str | Path]) -> dict[str, list | None]:
    """Size, time in ns and hash of each file; `None` for a file that does not exist.

    There are no hashes if the files have more than `HASHED_BYTES` in total. A remote file has its revision or tag in
    place of the time.

    Args:
        files (`Mapping[str, str | Path]`): Paths or URLs by name.
    """
    stats = {name: _stat(str(path)) for name, path in files.items()}
    is_small = sum(stat[0] for stat in stats.values() if stat is not None) <= HASHED_BYTES
    return {
        name: stat and [*stat, hash_file(files[name]) if is_small and "://" not in str(files[name]) else None]
        for name, stat in stats.items()
    }


def hash_file(path: str | Path) -> str:
    """A hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_dataset(
    dataset: str, output_dir: str | Path, splits: Iterable = (), image_column: str | None = None
) -> Inputs:
    """Fingerprint of a dataset.

    Args:
        dataset (`str`): A folder, a file pattern, local or remote, or a Hub id. Names of local files are relative to
            the folder or to their common folder.
        output_dir (`str` or `os.PathLike`): Where the results go; it is skipped if it lies in the dataset's folder.
        splits (`Iterable[datasets.Dataset | datasets.IterableDataset | None]`, *optional*): The dataset's rows. Where
            they name images by their paths, these files belong to the dataset.
        image_column (`str`, *optional*): The rows' column with the images.
    """
    from .source import READERS, file_patterns

    path = os.path.expanduser(dataset)
    suffixes = {suffix.lower() for suffix in Path(path).suffixes}
    if os.path.isdir(path):
        files = _files_below(Path(path), Path(output_dir))
    elif "://" in path or re.search(r"[*?\[{]", path) or suffixes & (READERS.keys() | SUFFIXES):
        files = _expand_patterns(file_patterns(path))
    else:
        return {f"the dataset {dataset}": _dataset_revision(dataset)}
    found = {"the dataset": fingerprint_files(files)}
    named = {name for rows in splits if rows is not None for name in _named_files(rows, image_column, files.values())}
    if named:
        found["the images that the dataset names"] = fingerprint_files({name: name for name in sorted(named)})
    return found


def fingerprint_rows(data, output_dir: str | Path, splits: Iterable) -> Inputs:
    """Fingerprint of the images of a training: the dataset, and the settings that choose among them.

    Args:
        data ([`~llamagen_hf.data.source.DataConfig`]): The recipe's section `data`.
        output_dir (`str` or `os.PathLike`): Where the results go.
        splits (`Iterable[datasets.Dataset | datasets.IterableDataset | None]`): The rows of its splits.
    """
    found = fingerprint_dataset(data.dataset, output_dir, splits, data.image_column)
    settings = ("dataset_config", "train_split", "test_split", "test_fraction", "split_seed", "image_column")
    values = {name: getattr(data, name) for name in (*settings, "image_size", "min_image_size")}
    return found | {f"the setting {name}": "none" if value is None else value for name, value in values.items()}


def fingerprint_checkpoint(source: str | Path, pattern: str = "*") -> str | dict[str, list | None]:
    """A checkpoint's revision if it is from the Hub, else the fingerprints of its files, without those in subfolders.

    Args:
        source (`str` or `os.PathLike`): A folder, or the Hub id of a model.
        pattern (`str`, *optional*, defaults to `"*"`): Which files of a folder belong to it.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(hf_hub_download(str(source), "config.json")).parent  # cached when it was loaded
    root = next((path for path in (folder, folder.parent) if path.parent.name == "snapshots"), None)
    if root is not None:
        return root.name
    files = (path for path in sorted(folder.glob(pattern)) if path.is_file() and not NOT_READ.fullmatch(path.name))
    return fingerprint_files({path.name: path for path in files})


def vq_model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of an image tokenizer's encoder and codebook, which decide its codes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_pipeline(pipe: DiffusionPipeline, prefix: str = "") -> Inputs:
    """The weights, settings and vocabularies that decide what a pipeline generates, including adapters.

    Those of a pipeline that is a component of it are named `"base.unet"` and the like.
    """
    own = {name: value for name, value in _public_config(pipe.config).items() if name not in pipe.components}
    found, components = {f"the settings of {prefix[:-1] or 'the pipeline'}": _hash(own)}, {}
    for name, component in pipe.components.items():
        if isinstance(component, DiffusionPipeline):
            found |= fingerprint_pipeline(component, f"{prefix}{name}.")
        else:
            components[f"{prefix}{name}"] = component
    return fingerprint_components(components) | found


def fingerprint_components(components: Mapping[str, object]) -> Inputs:
    """Weights of models, vocabularies of tokenizers, and settings of models and schedulers, by the names of each."""
    found: Inputs = {}
    for name, component in components.items():
        if isinstance(component, torch.nn.Module):
            found[f"the weights of {name}"] = fingerprint_module(component)
        if hasattr(component, "get_vocab"):
            words = sorted(component.get_vocab().items())
            found[f"the vocabulary of {name}"] = _hash(
                [words, component.special_tokens_map, component.model_max_length]
            )
        elif hasattr(component, "config"):
            found[f"the settings of {name}"] = _hash(_public_config(component.config))
    return found


@torch.no_grad()
def fingerprint_module(module: torch.nn.Module) -> str:
    """A hash of a model's weights, their dtypes, and its active adapters."""
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):  # offloaded by Accelerate
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        state = get_state_dict_offloaded_model(module)
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _plain_tensors(tensor):
            digest.update(part.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    for name, layer in module.named_modules():
        if isinstance(getattr(layer, "scaling", None), dict):  # PEFT's
            digest.update(f"{name} {layer.scaling} {layer.active_adapters} {layer.disable_adapters}".encode())
    return digest.hexdigest()


def describe_changes(before: Inputs, now: Inputs) -> str:
    """The differences in words, such as "1 file of the dataset was changed (a.png)"; empty if there are none."""
    changes = []
    for what in dict.fromkeys([*before, *now]):
        old, new = before.get(what), now.get(what)
        if isinstance(old, dict) or isinstance(new, dict):
            old, new = (files if isinstance(files, dict) else {} for files in (old, new))
            lists = {
                "changed": [name for name in new if name in old and not _is_same_file(old[name], new[name])],
                "added": [name for name in new if name not in old],
                "removed": [name for name in old if name not in new],
            }
            for verb, names in lists.items():
                if names:
                    some = ", ".join(sorted(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")
                    files = f"{len(names)} {'file' if len(names) == 1 else 'files'} of {what}"
                    changes.append(f"{files} {'was' if len(names) == 1 else 'were'} {verb} ({some})")
        elif what not in now:
            changes.append(f"{what} is no longer read")
        elif what not in before:
            changes.append(f"{what} is new")
        elif old != new and None not in (old, new):  # a revision is unknown where the Hub is out of reach
            changes.append(f"{what} changed")
    return ", ".join(changes)


def claim_inputs(folder: Path, inputs: Inputs, goes_on: bool, is_checked_otherwise: bool = False) -> None:
    """Check that the results in a folder were made from these inputs, or record the inputs of a new run.

    Args:
        folder (`Path`): The folder of the results; it is created if it does not exist.
        inputs (`Inputs`): What is read now.
        goes_on (`bool`): Whether there are results to go on with.
        is_checked_otherwise (`bool`, *optional*, defaults to `False`): Only warn if the inputs of the results are not
            recorded, as in earlier versions.

    Raises:
        ValueError: If the results were made from other input, or if their input is not recorded.
    """
    path = folder / INPUTS_FILE
    if goes_on and path.is_file():
        noted = json.loads(path.read_text(encoding="utf-8"))
        if changes := describe_changes({RENAMED.get(what, what): value for what, value in noted.items()}, inputs):
            raise ValueError(
                f"{folder} was made from other input: {changes}; go on with that input, take another folder, or start "
                "over with --overwrite."
            )
        return
    if goes_on and not is_checked_otherwise:
        raise ValueError(
            f"{folder} does not say what it was made from, as an earlier version wrote it; take another folder, or "
            "start over with --overwrite."
        )
    if goes_on:
        logger.warning("%s does not say what it was made from; it is taken to be what is read now.", folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, inputs, indent=None)


def _files_below(folder: Path, left_out: Path) -> dict[str, str]:
    """Name and path of the files in a folder that may belong to a dataset, without those of a folder in it."""
    found = find_files(folder)
    names = [name for name in found.images + found.others if not NOT_READ.fullmatch(name.rpartition("/")[2])]
    left_out, root = left_out.resolve(), folder.resolve()
    if left_out != root and left_out.is_relative_to(root):
        own = f"{left_out.relative_to(root).as_posix()}/"
        names = [name for name in names if not name.startswith(own)]
    return {name: os.path.join(folder, name) for name in names}


def _expand_patterns(patterns: list[str]) -> dict[str, str]:
    """Name and path or URL of the files that match patterns, found as `load_dataset` finds them."""
    from datasets.data_files import resolve_pattern

    files = [file for pattern in patterns for file in resolve_pattern(pattern, os.getcwd())]
    if any("://" in file for file in files):
        return {file: file for file in files}
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    return {Path(file).relative_to(root).as_posix(): file for file in files}


def _named_files(rows, column: str, files: Iterable[str]) -> set[str]:
    """The paths that rows hold in place of images, unless they are among `files` or in archives."""
    from datasets import Image

    rows = rows.select_columns([column]).cast_column(column, Image(decode=False))
    first = next((row[column] for row in rows if row[column] is not None), None)
    if first is None or first["bytes"] is not None or first["path"] is None:
        return set()
    folder = cache(os.path.realpath)
    places = {(folder(os.path.dirname(file)), os.path.basename(file)) for file in files}
    if (folder(os.path.dirname(first["path"])), os.path.basename(first["path"])) in places:
        return set()
    paths = (row[column]["path"] for row in rows if row[column] is not None)
    return {path for path in paths if path is not None and "://" not in path}


def _dataset_revision(name: str) -> str | None:
    """The commit of a dataset on the Hub, or of its copy in the cache; `None` if neither is known."""
    try:
        return HfApi().dataset_info(name).sha
    except (HTTPError, HFValidationError, OfflineModeIsEnabled):
        pass
    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True)).name
    except (LocalEntryNotFoundError, HFValidationError):
        logger.warning("The Hub can't be reached: whether %r changed is not known.", name)
        return None


def _public_config(config) -> dict:
    """A component's settings, without its origin and the library's version."""
    settings = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    passing = ("transformers_version", "dtype", "architectures")
    return {name: value for name, value in settings.items() if not name.startswith("_") and name not in passing}


def _plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor, or the tensors that a quantized one consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_tensors(getattr(tensor, name))]


def _stat(path: str) -> tuple[int, int | str] | None:
    """Size and time of a file; a remote file has its revision or tag in place of the time."""
    if "://" in path:
        from datasets.data_files import DataFilesList

        return 0, " ".join(DataFilesList.from_patterns([path]).origin_metadata[0])
    return (os.path.getsize(path), os.stat(path).st_mtime_ns) if os.path.isfile(path) else None


def _hash(value) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _is_same_file(one: list | None, other: list | None) -> bool:
    if one is None or other is None:
        return one == other
    if one[2] is not None and other[2] is not None:  # a copy or a checkout has another time
        return one[2] == other[2]
    return one[:2] == other[:2]
