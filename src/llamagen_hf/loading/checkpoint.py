"""Loading a checkpoint from a folder, the Hub or the package, with checks that the libraries' loaders leave out."""

from pathlib import Path, PurePosixPath

import torch
from diffusers import ModelMixin
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from ..local_paths import unless_folder
from .precision import resolve_dtype
from .quantization import check_quantization, quantized_names


ALIGNMENT = 64  # bytes; where torch allocates memory on a CPU
SHIPPED = Path(__file__).parents[1] / "checkpoints"
EMOJI_CHECKPOINT = SHIPPED / "emoji"
SHIPPED_NAMES = ("emoji", "emoji_upsampler")


def is_shipped(path) -> bool:
    """Whether a checkpoint is one that ships with the package: `None` for `"emoji"`, or its name as a string.

    A folder of that name is given as `"./emoji"` or as a `Path`.
    """
    return path is None or (isinstance(path, str) and path in SHIPPED_NAMES and (SHIPPED / path).is_dir())


def shipped_folder(path) -> Path | None:
    """The folder of a checkpoint that ships with the package, see [`is_shipped`]; `None` for any other."""
    return SHIPPED / (path or "emoji") if is_shipped(path) else None


def find_upsampler(checkpoint: str | None, upsampler: str | None = None) -> str | None:
    """The upsampler for the images of a checkpoint, as commands choose it.

    Args:
        checkpoint (`str`, *optional*): The checkpoint; the shipped one by default.
        upsampler (`str`, *optional*):
            A folder or Hub id, or `"none"`. By default the one that ships with the package, for the emoji checkpoint
            and as long as it ships, and none for other checkpoints.

    Returns:
        `str`: What to load, or `None` for none.
    """
    if upsampler is None and checkpoint in (None, "emoji") and is_shipped("emoji_upsampler"):
        return "emoji_upsampler"
    return None if upsampler == "none" else upsampler


def origin_name(path) -> str:
    """What the parameters of images call a checkpoint: the name of a shipped one, else its folder or Hub id."""
    if is_shipped(path) or Path(path).parent == SHIPPED:
        return Path(path or "emoji").name
    return f"./{path}" if str(path) in SHIPPED_NAMES else str(path)  # a folder of that name


class CheckpointLoaderMixin:
    """`from_pretrained` of a [`~diffusers.DiffusionPipeline`] with checks and errors of one sentence."""

    config_name = "model_index.json"
    # What `from_pretrained` loaded, so that an image can say what it was generated with.
    _origin: dict[str, str] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, **kwargs):
        """Load a checkpoint from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
                A folder or a Hub id. By default, and as `"emoji"`, the checkpoint that ships with the package; a
                folder of that name is `"./emoji"`. `"emoji_upsampler"` is its upsampler, if that ships too.
            kwargs: As for [`~diffusers.DiffusionPipeline.from_pretrained`]. Weights load as float32 unless `dtype`
                says otherwise; `"auto"` is what is fastest here, bfloat16 on an accelerator, if there is one, and on
                a CPU with instructions for it, else float32. With `quantization_config`, linear layers are rounded to
                fewer bits, see [`~llamagen_hf.loading.quantization.quantize_components`].

        Raises:
            OSError: If there is no such checkpoint, or if its weights are damaged or incomplete.
            ValueError: If `dtype` is none, if the weights are quantized and torchao is not installed, or if the
                quantization that is asked for does not run here.
        """
        folder = cls.find_checkpoint(pretrained_model_name_or_path, **kwargs)
        path = pretrained_model_name_or_path
        kwargs["dtype"] = kwargs.get("dtype", kwargs.pop("torch_dtype", torch.float32))
        if isinstance(kwargs["dtype"], str):
            kwargs["dtype"] = resolve_dtype(kwargs["dtype"])
        check_quantization(folder, kwargs)
        kwargs = cls._missing_settings(folder) | kwargs
        saved_names = read_weight_names(folder)
        pipe = super().from_pretrained(folder, **kwargs)
        for name, component in pipe.components.items():
            if name in saved_names and name not in kwargs and component is not None:
                if missing := find_missing_weights(component, saved_names[name]):
                    raise OSError(f"The weights of {name} in {origin_name(path)!r} miss {', '.join(missing)}.")
        pipe.register_to_config(_name_or_path=unless_folder(shipped_folder(path) or path))  # saving would publish it
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                align_weights(component)
            if isinstance(component, ModelMixin):
                component.register_to_config(_name_or_path=None)
        pipe._read_left_out(folder)
        pipe._origin = {"checkpoint": origin_name(path)}
        if folder.parent.name == "snapshots":
            pipe._origin["revision"] = folder.name
        if kwargs.get("variant") is not None:
            pipe._origin["variant"] = kwargs["variant"]
        return pipe

    @classmethod
    def _missing_settings(cls, folder: Path) -> dict:
        """A hook: arguments of the pipeline that a checkpoint made for another class does not hold.

        Raises:
            OSError: If the checkpoint is of a class that can't be loaded.
        """
        return {}

    def _read_left_out(self, folder: Path) -> None:
        """A hook: read from the checkpoint's folder what the pipeline needs of components that were left out."""

    @classmethod
    def find_checkpoint(cls, pretrained_model_name_or_path=None, **kwargs) -> Path:
        """The folder of a checkpoint, downloaded if necessary; arguments and errors as for [`from_pretrained`]."""
        path = pretrained_model_name_or_path
        if (shipped := shipped_folder(path)) is not None:
            return shipped
        folder = Path(path if Path(path).is_dir() else cls.download(path, **kwargs))
        if not (folder / cls.config_name).is_file():
            raise OSError(f"{str(path)!r} is not a checkpoint: it has no {cls.config_name}.")
        return folder

    @classmethod
    def download(cls, pretrained_model_name, **kwargs) -> str:
        """Download a checkpoint from the Hub into the cache and return its folder.

        The base class looks for Python files in the repository that define components of other libraries. Ours are
        defined in this package, so the files of the repository suffice.

        Args:
            pretrained_model_name (`str`): A Hub id.
            kwargs: `variant`, `cache_dir`, `force_download`, `local_files_only`, `token` and `revision`, as for
                [`~diffusers.DiffusionPipeline.from_pretrained`].

        Raises:
            OSError: If there is no such repository or revision, or if it can't be reached.
        """
        name, variant = str(pretrained_model_name), kwargs.get("variant")
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        # A second dot is that of a variant, as in model.fp16.safetensors.
        unwanted = ["*.*.safetensors"] if variant is None else cls._replaced_by(variant, name, options)
        try:
            return snapshot_download(name, ignore_patterns=["*.md", "*.png", *unwanted], **options)
        except GatedRepoError as error:
            raise OSError(f"Access to {name!r} is restricted: ask for it on the Hub, then log in here.") from error
        except RevisionNotFoundError as error:
            raise OSError(f"The repository {name!r} has no revision {options['revision']!r}.") from error
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise OSError(f"There is no folder and no repository {name!r}.") from error
        except LocalEntryNotFoundError as error:
            try:  # what is cached may suffice: files that another loader or variant left out are not needed
                cached = {key: value for key, value in options.items() if key in ("cache_dir", "revision")}
                return str(Path(hf_hub_download(name, cls.config_name, local_files_only=True, **cached)).parent)
            except LocalEntryNotFoundError:
                pass
            raise OSError(
                f"There is no folder {name!r}, and as a repository it is neither in the cache nor can the Hub be "
                "reached."
            ) from error

    @staticmethod
    def _replaced_by(variant: str, name: str, options: dict) -> list[str]:
        """Weights of a repository that the variant replaces."""
        if options.get("local_files_only"):
            return []
        try:
            files = HfApi(token=options.get("token")).list_repo_files(name, revision=options.get("revision"))
        except (HTTPError, HFValidationError, OfflineModeIsEnabled):
            return []  # the cache may suffice, and `download` reports a wrong name
        weights = [PurePosixPath(path) for path in files if path.endswith(".safetensors")]
        parts = {path.parent for path in weights if f".{variant}" in path.suffixes[0] and len(path.suffixes) > 1}
        return [str(path) for path in weights if path.parent in parts and len(path.suffixes) == 1]


def read_weight_names(folder: Path, pattern: str = "*/*.safetensors") -> dict[str, set[str]]:
    """Names of the saved weights by the name of their folder, that of a component, from the headers of its files.

    Raises:
        OSError: If a file is truncated or otherwise damaged.
    """
    names: dict[str, set[str]] = {}
    for path in sorted(folder.glob(pattern)):
        try:
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                names.setdefault(path.parent.name, set()).update(keys | quantized_names(keys, file.metadata()))
        except (SafetensorError, OSError) as error:
            raise OSError(f"A file of the checkpoint is damaged: {path.parent.name}/{path.name}.") from error
    return names


def align_weights(model: nn.Module) -> None:
    """Copy weights in the memory of a CPU that begin between two of its widest words, as those of a file often do.

    Some CPUs compute with these in another order. Images would differ in their last bits from those of the model that
    was saved.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        is_plain = type(tensor.data) is torch.Tensor and tensor.device.type == "cpu"
        if is_plain and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def find_missing_weights(component: nn.Module, saved_names: set[str]) -> list[str]:
    """Names of parameters that were not saved, under their own name or that of a parameter tied to them."""
    # transformers saves a part of a model, such as the text encoder of a CLIP, under the name it had in the whole.
    if len({name.partition(".")[0] for name in saved_names}) == 1:
        saved_names = saved_names | {name.partition(".")[2] for name in saved_names}
    names: dict[int, list[str]] = {}
    for name, parameter in component.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(aliases[0] for aliases in names.values() if not saved_names & set(aliases))
