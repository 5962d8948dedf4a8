"""Publishing a pipeline, a model, an adapter or codes on the Hub, with a card, in one commit."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, RepoCard, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from PIL import Image
from torch import nn

from ..families import Family, find_family, find_model_family
from ..images.grid import image_grid
from ..local_paths import is_hub_id
from .cards import MARKER, dataset_of, write_card
from .publications import MARKERS, SHEET, Publication, open_publication


PROMPTS = ["a red apple", "a cat", "a house by the sea", "a tree in winter"]
SHEET_CLASSES = 12
SHEET_SEEDS = 12
SHEET_SIDES = 128, 256  # of an image on the sheet, in pixels, at least and at most
MAX_SHEET_BYTES = 2_000_000
BATCH_SIZE = 64  # images of a sheet that are generated at once


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    space: bool = False,
    license: str | None = None,
    draw: bool = True,
    token: str | None = None,
    data_license: str | None = None,
) -> list[str]:
    """Publish a pipeline, a CLIP, a classifier, a LoRA adapter or a folder of codes; again to update it.

    Everything is uploaded in one commit, so that each revision is complete. Large files are sent before the commit;
    those that an interrupted upload has sent are not sent again.

    Args:
        folder (`str` or `os.PathLike`): What to publish. Checkpoints and samples of its training are not uploaded.
        repo_id (`str`): Where to, as `user/name`. Codes become a dataset, the others a model.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.
        space (`bool`, *optional*, defaults to `False`): Also make a Space of the same name that shows a pipeline.
        license (`str`, *optional*): The Hub's name of its licence, such as `"cc-by-4.0"`, for the card.
        draw (`bool`, *optional*, defaults to `True`): Generate a sample sheet for the card if the folder has none.
        token (`str`, *optional*): A token with write access; that of `hf auth login` or `HF_TOKEN` by default.
        data_license (`str`, *optional*):
            The licence of the images behind it, for the card; by default what the Hub says of their dataset.

    Returns:
        `list[str]`: Addresses of what was published.

    Raises:
        OSError: If the folder can't be published or is incomplete, if the Hub can't be reached or refuses, or if the
            repository holds something else.
    """
    publication = open_publication(folder)
    if space and not publication.draws_images:
        raise OSError("A Space shows a pipeline that draws images; what is published here is none.")
    template = space_folder() if space else None
    model = load(publication)
    if (token or get_token()) is None:
        raise OSError("Publishing needs a token with write access: run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token)
    with one_sentence_errors(repo_id, api.endpoint):
        repo_id, found = look_up(api, repo_id, publication.repo_type, private)
        check_ours(api, repo_id, publication, found)
        found_space = look_up_space(api, repo_id, private) if space else None
        data_license = data_license or look_up_license(api, publication)
        if is_hub_id(base := publication.json("adapter_config.json").get("base_model_name_or_path")):
            publication.family = look_up_family(api, base) or publication.family
    conditions = sheet_conditions(publication, model if publication.draws_images else None)
    # An upsampler needs images, which a card's sheet can't make up.
    if publication.draws_images and not model.upsamples and SHEET not in publication.files and draw:
        publication.files[SHEET] = png(generate_sheet(model, conditions, columns=4))
    card = write_card(publication, repo_id, model, conditions, license, data_license)
    with one_sentence_errors(repo_id, api.endpoint):
        publication.add("README.md", str(kept_prose(api, publication, repo_id, found, card)))
        url = upload(api, publication.files, repo_id, publication.repo_type, found, private, publication.owns)
        return [url] + ([publish_space(api, template, repo_id, private, found_space)] if space else [])


def load(publication: Publication) -> DiffusionPipeline | nn.Module | None:
    """Load the pipeline or model that is to be published, which shows that it is not damaged; `None` for others."""
    if publication.kind == "model":
        return publication.family.load(publication.folder)
    if publication.kind != "pipeline":
        return None
    weights = [Path(name).name for name in publication.files if name.endswith(".safetensors")]
    variant = None
    if weights and not any(name.count(".") == 1 for name in weights):  # only the likes of model.fp16.safetensors
        variant = weights[0].split(".")[1].partition("-")[0]
    pipe = publication.family.pipeline_class.from_pretrained(publication.folder, variant=variant)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


def sheet_conditions(publication: Publication, pipe: DiffusionPipeline | None) -> list[str | int]:
    """Prompts or classes that the training gives as examples; else classes at even distances, or any prompts.

    Without a condition they are what tells the images apart, their seeds.
    """
    if examples := next(filter(None, (facts.get("examples") for facts in publication.facts.values())), None):
        return examples
    if pipe is None or pipe.condition_kind == "text":
        return PROMPTS
    if pipe.condition_kind != "class":
        return list(range(SHEET_SEEDS))
    return sorted({pipe.num_classes * i // SHEET_CLASSES for i in range(SHEET_CLASSES)})


def generate_sheet(
    pipe: DiffusionPipeline, conditions: list[str | int], columns: int, side: int | None = None
) -> Image.Image:
    """Generate one image for each prompt, class or seed and lay them out with captions.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): The pipeline, used with its own sampling settings.
        conditions (`list[str | int]`):
            Prompts, or classes by id or name; without conditions the seeds. Image i has the seed i.
        columns (`int`): Images in a row.
        side (`int`, *optional*):
            Side in pixels to bring each image to; by default its own, but not below 128 or above 256.
    """
    name, images = {"text": "prompt", "class": "class_labels"}.get(pipe.condition_kind), []
    smallest, largest = SHEET_SIDES
    side = min(max(pipe.image_size, smallest), largest) if side is None else side
    for start in range(0, len(conditions), BATCH_SIZE):
        part = conditions[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        asked = {"num_images_per_prompt": len(part)} if name is None else {name: part}
        images += pipe(**asked, generator=generators).images
    return image_grid(images, columns, side, conditions if name else [f"seed {seed}" for seed in conditions])


def png(image: Image.Image) -> bytes:
    """An image as PNG of 256 colours, halved in size until it has at most [`MAX_SHEET_BYTES`]."""
    while True:
        file = io.BytesIO()
        image.quantize(256).save(file, "PNG", optimize=True)
        if file.tell() <= MAX_SHEET_BYTES:
            return file.getvalue()
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


def look_up(api: HfApi, repo_id: str, repo_type: str, private: bool) -> tuple[str, list[str] | None]:
    """The full name of a repository and its files, or `None` for the files if it does not exist yet."""
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return repo_id, None
    if private and not info.private:
        raise OSError(f"{repo_id} exists and is public; make it private on the Hub first, or choose another name.")
    return repo_id, [file.rfilename for file in info.siblings or []]


def look_up_license(api: HfApi, publication: Publication) -> str | None:
    """The licences that the Hub states for the datasets behind it, if they are public."""
    datasets = [publication.json("codes.json").get("dataset"), *map(dataset_of, publication.facts.values())]
    licenses: list[str] = []
    for dataset in filter(is_hub_id, dict.fromkeys(datasets)):
        try:
            found = (api.dataset_info(dataset).card_data or {}).get("license") or []
        except RepositoryNotFoundError:
            continue
        licenses += found if isinstance(found, list) else [found]
    return ", ".join(dict.fromkeys(licenses)) or None


def look_up_family(api: HfApi, repo_id: str) -> Family | None:
    """The family of a pipeline on the Hub; `None` if there is none, or if it is of another package."""
    return find_family(read_config(api, repo_id, "model_index.json").get("_class_name"))


def read_config(api: HfApi, repo_id: str, name: str) -> dict:
    """A JSON file of a repository of models; empty if there is none."""
    try:
        path = api.hf_hub_download(repo_id, name)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return {}
    return json.loads(Path(path).read_text(encoding="utf-8"))


def check_ours(api: HfApi, repo_id: str, publication: Publication, found: list[str] | None) -> None:
    """Raise an `OSError` if a repository holds anything else than an earlier version of a publication."""
    if not set(found or []) - {".gitattributes", "README.md"}:
        return
    is_ours = (marker := MARKERS[publication.kind]) in found
    if is_ours and publication.kind == "pipeline":
        is_ours = look_up_family(api, repo_id) is not None
    elif is_ours and publication.kind == "model":
        is_ours = find_model_family(read_config(api, repo_id, marker)) == publication.family
    if not is_ours:
        some = ", ".join(sorted(found)[:3])
        raise OSError(f"{repo_id} exists and holds something else ({some}, ...); choose another name.")


def kept_prose(
    api: HfApi, publication: Publication, repo_id: str, found: list[str] | None, card: RepoCard
) -> RepoCard:
    """The card, with its text replaced by what a person wrote into the folder or on the Hub, if anyone did."""
    path = publication.folder / "README.md"
    if not path.is_file():
        if "README.md" not in (found or []):
            return card
        path = Path(api.hf_hub_download(repo_id, "README.md", repo_type=publication.repo_type))
    text = path.read_text(encoding="utf-8")
    if MARKER in text:
        return card
    written = type(card)(text, ignore_metadata_errors=True)
    known = {name: value for name, value in written.data.to_dict().items() if value is not None}
    merged = card.data.to_dict() | known
    merged["tags"] = list(dict.fromkeys([*known.get("tags", []), *(card.data.get("tags") or [])]))
    written.content = f"---\n{type(card.data)(**merged, ignore_metadata_errors=True)}\n---\n{written.text}"
    return written


def upload(
    api: HfApi,
    files: dict[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    found: list[str] | None,
    private: bool,
    owns=lambda path: False,
) -> str:
    """Commit files, and delete those that `owns` says are no longer in the folder; the repository's address."""
    if found is None:
        options = {"space_sdk": "gradio"} if repo_type == "space" else {}
        api.create_repo(repo_id, repo_type=repo_type, private=private, **options)
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    operations += [CommitOperationDelete(name) for name in found or [] if name not in files and owns(name)]
    message = "Update" if found else "Publish"
    # Not upload_folder, which would take all files, nor upload_large_folder, which makes a commit for every few.
    return api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type).repo_url.url


def space_folder() -> Path:
    """The folder of the Space's files: within an installed package, or in a checkout beside it.

    Raises:
        OSError: If they are in neither.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "space", package.parents[1] / "spaces" / "llamagen"):
        if (folder / "app.py").is_file():
            return folder
    raise OSError("The Space's files are not in this installation of llamagen-hf.")


def look_up_space(api: HfApi, repo_id: str, private: bool) -> list[str] | None:
    """The files of a model's Space, `None` if there is none; an `OSError` if it is another Space."""
    _, found = look_up(api, repo_id, "space", private)
    if set(found or []) - {".gitattributes", "README.md"}:
        app = api.hf_hub_download(repo_id, "app.py", repo_type="space") if "app.py" in found else None
        if app is None or "llamagen_hf" not in Path(app).read_text(encoding="utf-8"):
            raise OSError(f"The Space {repo_id} exists and holds something else; rename it first.")
    return found


def publish_space(api: HfApi, template: Path, repo_id: str, private: bool, found: list[str] | None) -> str:
    """Make or update the Space that shows a model."""
    card = ModelCard.load(template / "README.md", ignore_metadata_errors=True)
    card.data.title = repo_id.rpartition("/")[2]
    card.data.models = [repo_id]
    files: dict[str, Path | bytes] = {name: template / name for name in ("app.py", "requirements.txt")}
    url = upload(api, files | {"README.md": str(card).encode()}, repo_id, "space", found, private)
    api.add_space_variable(repo_id, "LLAMAGEN_CHECKPOINT", repo_id)
    return url


@contextmanager
def one_sentence_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn the Hub's errors into an `OSError` of one sentence."""
    try:
        yield
    except HFValidationError as error:
        raise OSError(f"{repo_id!r} is not the name of a repository; expected user/name.") from error
    except OfflineModeIsEnabled as error:
        raise OSError("HF_HUB_OFFLINE is set, but publishing needs the Hub; unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise OSError("The Hub does not know this token; run `hf auth login`, or set HF_TOKEN.") from error
        if status == 403:
            raise OSError(f"This token may not write to {repo_id}.") from error
        reason = error.server_message or f"status {status}"
        raise OSError(f"The Hub refused to publish {repo_id}: {reason}") from error
    except RuntimeError as error:  # huggingface_hub raises it for a file that could not be sent
        raise OSError(f"The upload to {repo_id} broke off ({error}); start it again to continue.") from error
    except HTTPError as error:  # without an answer: the connection failed
        raise OSError(f"The Hub at {endpoint} can't be reached; nothing has changed there.") from error
