"""Where a checkpoint comes from: a folder, the Hub, or the package itself."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .weights import find_missing_weights, read_weight_names


EMOJI_CHECKPOINT = Path(__file__).parent / "checkpoints" / "emoji"


class CheckpointLoaderMixin:
    """`from_pretrained` of a [`~diffusers.DiffusionPipeline`] that says in a sentence what is wrong."""

    # What `from_pretrained` loaded, so that a picture can say what it was drawn with.
    _origin: dict[str, str] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, **kwargs):
        """Load a checkpoint from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
                A folder or a Hub id. By default, and as `"emoji"`, the checkpoint that ships with the package.
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
        # Saving would publish this path, of interest on this machine only.
        pipe.register_to_config(_name_or_path=None if Path(path).is_dir() else str(path))
        pipe.vq_model.register_to_config(_name_or_path=None)
        pipe._origin = {"checkpoint": "emoji" if path == EMOJI_CHECKPOINT else str(path)}
        if folder.parent.name == "snapshots":
            pipe._origin["revision"] = folder.name
        if kwargs.get("variant") is not None:
            pipe._origin["variant"] = kwargs["variant"]
        return pipe

    @classmethod
    def find_checkpoint(cls, pretrained_model_name_or_path=None, **kwargs) -> Path:
        """The folder of a checkpoint, fetched if need be; arguments and errors as for [`from_pretrained`]."""
        path = pretrained_model_name_or_path
        if path is None or (path == "emoji" and not Path(path).is_dir()):
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
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        try:
            return snapshot_download(str(pretrained_model_name), ignore_patterns=["*.md", "*.png"], **options)
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise OSError(f"There is no folder and no repository {str(pretrained_model_name)!r}.") from error
        except LocalEntryNotFoundError as error:
            raise OSError(
                f"There is no folder {str(pretrained_model_name)!r}, and as a repository it is neither in the cache "
                "nor can the Hub be reached."
            ) from error
