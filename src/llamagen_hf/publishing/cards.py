"""Model and dataset cards, from a template and the facts of a training."""

import json
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData, RepoCard
from torch import nn

from ..evaluation.report import REPORT, model_index_results, read_report
from ..evaluation.report.markdown import markdown_notes, markdown_summary
from ..families import FAMILIES, MODELS, Family, Method, ModelFamily
from ..loading.checkpoint import SHIPPED_NAMES
from ..loading.components import list_components
from ..local_paths import is_hub_id, public_name
from .publications import SHEET, Publication


MARKER = "<!-- `llamagen publish` wrote this card, and will write it again unless this line is removed. -->"
UNSTATED = "a dataset that is not stated"
TEMPLATE = Path(__file__).parent / "card_template.md"
UPSAMPLING = {"psnr": ("PSNR in dB", ".2f"), "ssim": ("SSIM", ".3f"), "lpips": ("LPIPS", ".3f")}
# Label and format of each metric, by the section of the record that holds it.
METRICS = {
    "generator": {
        "test_loss": ("generator, loss in nats a code", ".3f"),
        "test_loss_without_condition": ("... without its conditions", ".3f"),
    },
    "vq_model": {
        "test_psnr": ("tokenizer, PSNR in dB", ".2f"),
        "test_ssim": ("tokenizer, SSIM", ".3f"),
        "test_codebook_usage": ("tokenizer, share of its codes in use", ".1%"),
        "test_codebook_perplexity": ("tokenizer, perplexity of its codes", ".1f"),
    },
    "diffusion": {
        "test_loss": ("loss", ".4f"),
        "test_loss_without_prompt": ("... without its prompts", ".4f"),
    }
    | {
        f"test_{kind}{name}{rival}": (
            "... enlarged bicubically" if rival else f"{images} images enlarged, {label}", spec
        )
        for kind, images in (("", "reduced"), ("redrawn_", "redrawn"))
        for name, (label, spec) in UPSAMPLING.items()
        for rival in ("", "_bicubic")
    },
    "prior": {
        "test_loss": ("loss", ".4f"),
        "test_cosine": ("drawn embeddings, cosine to those of the images", ".3f"),
        "test_text_cosine": ("... of the captions' own embeddings", ".3f"),
        "test_retrieval": ("drawn embeddings, images that they find", ".1%"),
        "test_text_retrieval": ("... of the captions' own embeddings", ".1%"),
    },
    "clip": {
        "test_loss": ("contrastive loss in nats", ".3f"),
        "test_image_to_text_r1": ("images whose caption is found", ".1%"),
        "test_text_to_image_r1": ("captions whose image is found", ".1%"),
        "test_r_precision": ("images whose caption is found among 100", ".1%"),
    },
    "classifier": {
        "test_loss": ("loss in nats, over all levels of noise", ".3f"),
        "test_accuracy_0": ("accuracy at timestep 0 of 1,000, almost without noise", ".1%"),
    }
    | {f"test_accuracy_{step}": (f"... at timestep {step}", ".1%") for step in (250, 500, 750)},
}  # fmt: skip
# Task on the Hub, tag and noun, by what a pipeline generates from. The Hub has no task for classes.
KINDS = {
    "text": ("text-to-image", "text-to-image", "A text-conditional image generator"),
    "class": ("unconditional-image-generation", "class-conditional", "A class-conditional image generator"),
    "none": ("unconditional-image-generation", "unconditional", "An unconditional image generator"),
    "image": ("image-to-image", "super-resolution", "An upsampler of images"),
}


def write_card(
    publication: Publication,
    repo_id: str,
    pipe: DiffusionPipeline | nn.Module | None,
    conditions: list[str | int],
    license: str | None,
    data_license: str | None = None,
) -> RepoCard:
    """Write the card of what is published.

    Args:
        publication ([`~llamagen_hf.publishing.publications.Publication`]): What is published.
        repo_id (`str`): The repository, `user/name`.
        pipe ([`~diffusers.DiffusionPipeline`] or `torch.nn.Module`, *optional*):
            The pipeline or model, if one is published.
        conditions (`list[str | int]`): Prompts or classes of the sample sheet.
        license (`str`, *optional*): The Hub's name of the licence, such as `"cc-by-4.0"`.
        data_license (`str`, *optional*): The licence of the images behind it.
    """
    family, records, name = publication.family, publication.facts, repo_id.rpartition("/")[2]
    card, card_data = ModelCard, ModelCardData
    if publication.draws_images:
        data, texts = pipeline_card(family, repo_id, pipe, conditions)
    elif publication.kind == "pipeline":
        data, texts = prior_card(family, repo_id, pipe)
    elif publication.kind == "model":
        data, texts = model_card(family, repo_id, pipe)
    elif publication.kind == "adapter":
        data, texts = adapter_card(family, repo_id, publication.json("adapter_config.json"), conditions, records)
    else:
        card, card_data = DatasetCard, DatasetCardData
        data, texts = codes_card(family, repo_id, publication.json("codes.json"))
    metrics = [(dataset_of(facts), *row) for part, facts in records.items() for row in read_metrics(facts, part)]
    results = [
        EvalResult(data["pipeline_tag"], dataset or UNSTATED, dataset or UNSTATED, metric, round(value, 5),
                   dataset_split="test", metric_name=label)
        for dataset, metric, label, value, _ in metrics
    ]  # fmt: skip
    if REPORT in publication.files:
        report = read_report(publication.folder / REPORT)
        results += model_index_results(report)
        texts["evaluation"] = "\n\n".join(filter(None, (markdown_summary(report), markdown_notes(report))))
    if results:
        data |= {"model_name": name, "eval_results": results}
    if datasets := list(filter(is_hub_id, dict.fromkeys(map(dataset_of, records.values())))):
        data["datasets"] = datasets
    starts = [
        facts.get(each.record, {}).get("settings", {}) for facts in records.values() for each in (*FAMILIES, *MODELS)
    ]
    if base := next((settings["init_from"] for settings in starts if is_hub_id(settings.get("init_from"))), None):
        data.setdefault("base_model", base)
    recipes = {part: {key: facts[key] for key in facts if key != "examples"} for part, facts in records.items()}
    texts = {
        "title": name,
        "marker": MARKER,
        "family": family,
        "sheet": SHEET if SHEET in publication.files else None,
        "data": data_text(records),
        "data_license": data_license,
        "metrics": [(label, written) for _, _, label, _, written in metrics],
        "recipe": json.dumps(recipes.get("", recipes), indent=2) if records else None,
    } | texts
    return card.from_template(card_data(license=license, **data), template_path=str(TEMPLATE), **texts)


def pipeline_card(family: Family, repo_id: str, pipe: DiffusionPipeline, conditions: list) -> tuple[dict, dict]:
    """Metadata and texts of a pipeline's card."""
    is_text = pipe.condition_kind == "text"
    task, tag, noun = KINDS["image" if pipe.upsamples else pipe.condition_kind]
    data = {"library_name": "diffusers", "pipeline_tag": task, "tags": [*family.tags, tag]}
    if is_text and not pipe.upsamples:
        data["widget"] = [{"text": prompt} for prompt in conditions[:5]]
    arguments, reads = [], []
    if is_text:
        arguments.append(f'"{conditions[0]}"')
        reads.append("a prompt")
    elif pipe.condition_kind == "class":
        arguments.append(f"class_labels={conditions[0]!r}")
        reads.append("a class")
    if pipe.upsamples:
        arguments.append('image=load_image("small.png")')
        reads.append(f"an image of at most {pipe.image_size} x {pipe.image_size} pixels")
    texts = {
        "summary": f"{noun}: {family.name} ({family.reference}). {family.summary.format(pipe=pipe)}",
        "checkpoint": repo_id,
        "upsamples": pipe.upsamples,
        "condition": ", ".join(arguments),
        "generation": [
            ("reads", " and ".join(reads) or "nothing but noise"),
            ("image", f"{pipe.image_size} x {pipe.image_size} pixels"),
            *((f"`{name}`", f"{value}") for name, value in pipe.sampling_settings().items()),
        ],
        "parameters": count_parameters(pipe),
    }
    return data, texts


def prior_card(family: Family, repo_id: str, pipe: DiffusionPipeline) -> tuple[dict, dict]:
    """Metadata and texts of the card of a pipeline that draws embeddings."""
    kind = "autoregressive" if pipe.is_autoregressive else "diffusion"
    data = {"library_name": "diffusers", "pipeline_tag": family.task, "tags": [*family.tags, f"{kind}-prior"]}
    texts = method_texts(family, repo_id, pipe) | {
        "generation": [
            ("reads", f"a prompt of at most {pipe.condition_length} tokens"),
            ("draws", f"an embedding of {pipe.embedding_dim} numbers, of length 1"),
            ("kind", kind),
            *((f"`{name}`", f"{value}") for name, value in pipe.sampling_settings().items()),
        ],
        "parameters": count_parameters(pipe),
    }
    return data, texts


def model_card(family: ModelFamily, repo_id: str, model: nn.Module) -> tuple[dict, dict]:
    """Metadata and texts of the card of a model that is no pipeline."""
    data = {"library_name": family.library, "pipeline_tag": family.task, "tags": [*family.tags]}
    labels = getattr(model.config, "labels", [])
    first = json.dumps(labels[0], ensure_ascii=False) if labels else None
    texts = method_texts(family, repo_id, model, label=first) | {
        "classes": ", ".join(labels),
        "parameters": [("all", millions(model))],
    }
    return data, texts


def method_texts(family: Method, repo_id: str, pipe, **more) -> dict:
    """What the table says about a method whose models draw no images."""
    return {
        "summary": f"{family.noun}: {family.name} ({family.reference}). {family.summary.format(pipe=pipe)}",
        "usage": family.usage.format(checkpoint=repo_id, **more),
        "limits": family.limits,
    }


def count_parameters(pipe: DiffusionPipeline) -> list[tuple[str, str]]:
    """The size of each model in a pipeline."""
    return [(name, millions(part)) for name, part in list_components(pipe) if isinstance(part, nn.Module)]


def millions(model: nn.Module) -> str:
    """The number of a model's parameters, written in millions."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


def adapter_card(
    family: Family, repo_id: str, adapter: dict, conditions: list, records: dict[str, dict]
) -> tuple[dict, dict]:
    """Metadata and texts of a LoRA adapter's card."""
    data = {"library_name": "peft", "pipeline_tag": "text-to-image", "tags": [*family.tags, "lora"]}
    base = adapter.get("base_model_name_or_path")
    if is_hub_id(base):
        data["base_model"] = base
    elif base not in SHIPPED_NAMES:  # checkpoints of the package; any other name is that of a folder
        base = "the checkpoint that it was trained on"
    settings = records.get("", {}).get(family.record, {}).get("settings", {})
    upsamples = settings.get("low_image_size") is not None
    arguments = []
    if settings.get("conditioning") != "none":
        arguments.append(f'"{conditions[0]}"' if conditions and isinstance(conditions[0], str) else "...")
    if upsamples:
        data["pipeline_tag"] = KINDS["image"][0]
        arguments.append('image=load_image("small.png")')
    texts = {
        "summary": f"A LoRA adapter of rank {adapter.get('r')} for {family.name} ({family.reference}).",
        "checkpoint": base,
        "adapter": repo_id,
        "upsamples": upsamples,
        "condition": ", ".join(arguments),
    }
    return data, texts


def codes_card(family: Family, repo_id: str, info: dict) -> tuple[dict, dict]:
    """Metadata and texts of the card of a dataset of codes."""
    fingerprint = info.get("vq_model_fingerprint") or info["tokenizer_fingerprint"]  # of earlier versions
    splits = [split for split in ("train", "test") if info["rows"].get(split)]
    files = [{"split": split, "path": f"{split}-*.parquet"} for split in splits]
    rows = " and ".join(f"{info['rows'][split]:,} of the {split} split" for split in splits)
    data = {"tags": [family.tags[0], "image-codes"], "configs": [{"config_name": "default", "data_files": files}]}
    if is_hub_id(dataset := public_name(info["dataset"])):
        data["source_datasets"] = [dataset]
    texts = {
        "summary": (
            f"Images as codes of an image tokenizer, for training {family.name} ({family.reference}): {rows}, each "
            f"with grids of {' x '.join(map(str, info['grid']))} codes, each code one of {info['vocab_size']:,}. "
            f"Their tokenizer has the fingerprint `{fingerprint}`; no other one can decode them."
        ),
        "codes": repo_id,
        "data": f"The images are those of {linked(dataset)}. They can be decoded from their codes, so the terms of "
        "their licence apply to the codes too.",
    }
    return data, texts


def dataset_of(facts: dict) -> str | None:
    """The dataset of a training, if its record names one."""
    return facts.get("data", {}).get("dataset")


def read_metrics(facts: dict, part: str = "") -> list[tuple[str, str, float, str]]:
    """Name, label, value and written value of each metric that a training measured; `part` is what it is of."""
    facts = facts | {"vq_model": facts.get("vq_model") or facts.get("tokenizer", {})}  # its name in earlier versions
    rows = []
    for section, metrics in METRICS.items():
        measured = facts.get(section, {}).get("metrics", {})
        for name, (label, spec) in metrics.items():
            if name in measured:
                label = f"{part}: {label}" if part else label
                rows.append((name, label, measured[name], format(measured[name], spec)))
    return rows


def data_text(records: dict[str, dict]) -> str:
    """What the parts of a model were trained on."""
    texts = {}
    for part, facts in records.items():
        if "data" in facts:
            rows = facts.get("codes", {}).get("rows", {})
            counts = f", {rows['train']:,} images for training and {rows.get('test', 0):,} for testing" if rows else ""
            texts[part] = f"The images of {linked(dataset_of(facts) or UNSTATED)}{counts}."
    if len(set(texts.values())) < 2:
        return next(iter(texts.values()), "Not stated.")
    return "\n".join(f"- {part}: {text}" for part, text in texts.items()) + "\n\n"


def linked(dataset: str) -> str:
    """A dataset's name, as a link if it is a Hub id."""
    return f"[{dataset}](https://huggingface.co/datasets/{dataset})" if is_hub_id(dataset) else dataset
