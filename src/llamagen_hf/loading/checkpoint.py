"""Where a checkpoint comes from: a folder, the Hub, or the package itself."""

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

from ..local_paths import unless_folder
from .weights import find_missing_weights, read_weight_names


EMOJI_CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "emoji"


def is_shipped(path) -> bool:
    """Whether a checkpoint is the one that ships with the package: none at all, or "emoji", as text.

    A folder of that name is `./emoji`, or a `Path`.
    """
    return path is None or path == "emoji"


class CheckpointLoaderMixin:
    """`from_pretrained` of a [`~diffusers.DiffusionPipeline`] that says in a sentence what is wrong."""

    config_name = "model_index.json"
    # What `from_pretrained` loaded, so that an image can say what it was drawn with.
    _origin: dict[str, str] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, **kwargs):
        """Load a checkpoint from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
                A folder or a Hub id. By default, and as `"emoji"`, the checkpoint that ships with the package; a
                folder of that name is `"./emoji"`.
            kwargs: As for [`~diffusers.DiffusionPipeline.from_pretrained`]. Weights load as float32 unless `dtype`
                says otherwise.

        Raises:
            OSError: In one sentence, if there is no such checkpoint, or if its weights are damaged or incomplete.
        """
        folder = cls.find_checkpoint(pretrained_model_name_or_path, **kwargs)
        path = EMOJI_CHECKPOINT if folder == EMOJI_CHECKPOINT else pretrained_model_name_or_path
        kwargs["dtype"] = kwargs.get("dtype", kwargs.pop("torch_dtype", torch.float32))
        saved_names = read_weight_names(folder)
        pipe = super().from_pretrained(folder, **kwargs)
        for name, component in pipe.components.items():
            if name in saved_names and name not in kwargs and component is not None:
                if missing := find_missing_weights(component, saved_names[name]):
                    raise OSError(f"The weights of {name} in {str(path)!r} miss {', '.join(missing)}.")
        pipe.register_to_config(_name_or_path=unless_folder(path))  # saving the pipeline would publish a path
        for component in pipe.components.values():
            if isinstance(component, ModelMixin):
                component.register_to_config(_name_or_path=None)
        pipe._read_left_out(folder)
        name = "./emoji" if str(path) == "emoji" else str(path)  # a folder, for another one is meant by "emoji"
        pipe._origin = {"checkpoint": "emoji" if path == EMOJI_CHECKPOINT else name}
        if folder.parent.name == "snapshots":
            pipe._origin["revision"] = folder.name
        if kwargs.get("variant") is not None:
            pipe._origin["variant"] = kwargs["variant"]
        return pipe

    def _read_left_out(self, folder: Path) -> None:
        """Read from the checkpoint's folder what the pipeline needs of components that were left out."""

    @classmethod
    def find_checkpoint(cls, pretrained_model_name_or_path=None, **kwargs) -> Path:
        """The folder of a checkpoint, fetched if need be; arguments and errors as for [`from_pretrained`]."""
        path = pretrained_model_name_or_path
        if is_shipped(path):
            return EMOJI_CHECKPOINT
        folder = Path(path if Path(path).is_dir() else cls.download(path, **kwargs))
        if not (folder / cls.config_name).is_file():
            raise OSError(f"{str(path)!r} is no checkpoint: it has no {cls.config_name}.")
        return folder

    @classmethod
    def download(cls, pretrained_model_name, **kwargs) -> str:
        """Fetch a checkpoint from the Hub into the cache and return its folder.

        The base class looks up which Python files a repository must hold to define components that are not its own.
        Ours are in this package, so the files of the repository are all there is to fetch.
        """
        name, variant = str(pretrained_model_name), kwargs.get("variant")
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        # A second dot is that of a variant, as in model.fp16.safetensors.
        unwanted = ["*.*.safetensors"] if variant is None else cls._replaced_by(variant, name, options)
        try:
            return snapshot_download(name, ignore_patterns=["*.md", "*.png", *unwanted], **options)
        except GatedRepoError as error:
            raise OSError(
                f"The repository {name!r} asks for consent: give it on the Hub, then log in here."
            ) from error
        except RevisionNotFoundError as error:
            raise OSError(f"The repository {name!r} has no revision {options['revision']!r}.") from error
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise OSError(f"There is no folder and no repository {name!r}.") from error
        except LocalEntryNotFoundError as error:
            try:  # files that another loader or another variant left out may be missing; loading needs no more of them
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
        """Weights of a repository in place of which the variant is loaded."""
        if options.get("local_files_only"):
            return []
        try:
            files = HfApi(token=options.get("token")).list_repo_files(name, revision=options.get("revision"))
        except (HTTPError, HFValidationError, OfflineModeIsEnabled):
            return []  # the cache has what it has, and a name that is wrong gets its sentence elsewhere
        weights = [PurePosixPath(path) for path in files if path.endswith(".safetensors")]
        parts = {path.parent for path in weights if f".{variant}" in path.suffixes[0] and len(path.suffixes) > 1}
        return [str(path) for path in weights if path.parent in parts and len(path.suffixes) == 1]
