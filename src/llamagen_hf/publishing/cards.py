"""Model and dataset cards, from a template and the facts of a training."""

import json
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData, RepoCard

from ..evaluation.report import REPORT, model_index_results, read_report
from ..evaluation.report.markdown import markdown_notes, markdown_summary
from ..local_paths import public_name
from ..training.record import FACTS_FILE
from .publications import Publication


MARKER = "<!-- `llamagen publish` wrote this card, and will write it again unless this line is removed. -->"
TEMPLATE = Path(__file__).parent / "card_template.md"
METRICS = {
    "test_loss": ("generator, loss in nats a code", ".3f"),
    "test_loss_without_condition": ("... without its conditions", ".3f"),
    "test_psnr": ("tokenizer, PSNR in dB", ".2f"),
    "test_ssim": ("tokenizer, SSIM", ".3f"),
    "test_codebook_usage": ("tokenizer, share of its codes in use", ".1%"),
    "test_codebook_perplexity": ("tokenizer, perplexity of its codes", ".1f"),
}


def write_card(
    publication: Publication,
    repo_id: str,
    pipe: DiffusionPipeline | None,
    conditions: list[str | int],
    has_sheet: bool,
    license: str | None,
    data_license: str | None = None,
) -> RepoCard:
    """The card of what is published.

    Args:
        publication ([`~llamagen_hf.publishing.publications.Publication`]): What it is.
        repo_id (`str`): Where it goes.
        pipe ([`~diffusers.DiffusionPipeline`], *optional*): The pipeline itself, if it is one.
        conditions (`list[str | int]`): Prompts or classes of the sample sheet.
        has_sheet (`bool`): Whether there is a sample sheet.
        license (`str`, *optional*): The Hub's name of the licence, such as `"cc-by-4.0"`.
        data_license (`str`, *optional*): That of the images that it was trained on, or made from.
    """
    facts = publication.json(FACTS_FILE)
    write = {"pipeline": pipeline_card, "adapter": adapter_card, "codes": codes_card}[publication.kind]
    data, texts = write(publication, repo_id, facts, pipe, conditions)
    data["license"] = license
    texts["evaluation"] = None
    if REPORT in publication.files:
        report = read_report(publication.folder / REPORT)
        data["model_name"] = repo_id.rpartition("/")[2]
        data["eval_results"] = data.get("eval_results", []) + model_index_results(report)
        texts["evaluation"] = evaluation_text(report)
    texts["data"] += f" Their licence: {data_license}." if data_license else " Their licence is not stated here."
    texts |= {
        "title": repo_id.rpartition("/")[2],
        "marker": MARKER,
        "sheet": "contact_sheet.png" if has_sheet else None,
        "sheet_text": "Drawn once with the seeds 0, 1, 2, ... in this order. None was chosen.",
        "recipe": json.dumps({name: value for name, value in facts.items() if name != "examples"}, indent=2),
    }
    if not facts:
        texts["recipe"] = None
    card, card_data = (DatasetCard, DatasetCardData) if publication.kind == "codes" else (ModelCard, ModelCardData)
    return card.from_template(card_data(**data), template_path=str(TEMPLATE), **texts)


def pipeline_card(publication, repo_id, facts, pipe, conditions) -> tuple[dict, dict]:
    is_text = pipe.condition_kind == "text"
    family, config = publication.family, pipe.transformer.config
    argument = f'"{conditions[0]}"' if is_text else f"class_labels={conditions[0]!r}"
    data = {
        "library_name": "diffusers",
        # The Hub has no task of its own for classes.
        "pipeline_tag": "text-to-image" if is_text else "unconditional-image-generation",
        "tags": [*family.tags, "text-to-image" if is_text else "class-conditional"],
    }
    data |= sources_and_metrics(repo_id, facts, data["pipeline_tag"])
    if is_text:
        data["widget"] = [{"text": prompt} for prompt in conditions[:5]]
    texts = {
        "summary": (
            f"A {'text' if is_text else 'class'}-conditional image generator: {family.name} ({family.paper}, "
            f"arXiv {family.arxiv}), {pipe.image_size} x {pipe.image_size} pixels from {config.grid_size} x "
            f"{config.grid_size} codes."
        ),
        "usage": usage(family.pipeline, repo_id, argument),
        "parameters": [
            (name, f"{sum(p.numel() for p in component.parameters()) / 1e6:.1f}M")
            for name, component in pipe.components.items()
            if name in ("vq_model", "transformer", "text_encoder") and component is not None
        ],
        "metrics": metric_rows(facts),
        "data": data_text(facts),
        "limits": limits_text(facts),
    }
    return data, texts


def adapter_card(publication, repo_id, facts, pipe, conditions) -> tuple[dict, dict]:
    adapter = publication.json("adapter_config.json")
    base = adapter.get("base_model_name_or_path")
    repository = base if base and "/" in base else None  # else a folder's name, or the checkpoint that ships with us
    checkpoint = repository or ("emoji" if base == "emoji" else "the checkpoint that it was trained on")
    data = {
        "library_name": "peft",
        "pipeline_tag": "text-to-image",
        "tags": ["llamagen", "autoregressive", "lora"],
        **sources_and_metrics(repo_id, facts, "text-to-image"),
    }
    if repository:
        data["base_model"] = repository
    prompt = f'"{conditions[0]}"' if conditions and isinstance(conditions[0], str) else "..."
    texts = {
        "summary": f"A LoRA adapter of rank {adapter.get('r')} for a LlamaGen generator (arXiv 2406.06525).",
        "usage": usage("AutoregressiveImagePipeline", checkpoint, prompt, f'pipe.load_lora_weights("{repo_id}")\n'),
        "parameters": [],
        "metrics": metric_rows(facts),
        "data": data_text(facts),
        "limits": limits_text(facts),
    }
    return data, texts


def codes_card(publication, repo_id, facts, pipe, conditions) -> tuple[dict, dict]:
    info = publication.json("codes.json")
    splits = [split for split in ("train", "test") if info["rows"].get(split)]
    files = [{"split": split, "path": f"{split}-*.parquet"} for split in splits]
    rows = " and ".join(f"{info['rows'][split]:,} of the {split} split" for split in splits)
    data = {
        "tags": ["llamagen", "image-codes"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    if "/" in (dataset := public_name(info["dataset"])):
        data["source_datasets"] = [dataset]
    grid = " x ".join(map(str, info["grid"]))
    texts = {
        "summary": (
            f"Images as codes of an image tokenizer, for training LlamaGen (arXiv 2406.06525): {rows}, each with "
            f"grids of {grid} codes, each code one of {info['vocab_size']:,}. Their tokenizer has the fingerprint "
            f"`{info['tokenizer_fingerprint']}`; no other can read them."
        ),
        "usage": (
            "Train on them, with that tokenizer:\n\n```bash\nllamagen train-generator --config RECIPE "
            f"--codes_dir {repo_id}\n```"
        ),
        "parameters": [],
        "metrics": [],
        "data": f"The images are those of {linked(dataset)}. They can be decoded from their codes, so what their "
        "licence asks for holds for these too.",
        "limits": "Only as good as their tokenizer: what it loses, nothing trained on its codes can draw.",
    }
    return data, texts


def usage(pipeline: str, checkpoint: str, argument: str, more: str = "") -> str:
    """The lines that draw an image."""
    return (
        f"```python\nfrom llamagen_hf import {pipeline}\n\n"
        f'pipe = {pipeline}.from_pretrained("{checkpoint}")\n{more}'
        f"image = pipe({argument}).images[0]\n```\n\nIt needs `pip install llamagen-hf`."
    )


def sources_and_metrics(repo_id: str, facts: dict, task: str) -> dict:
    """`base_model`, `datasets`, `model_name` and `eval_results` of the card's metadata."""
    data = {}
    if "/" in (dataset := facts.get("data", {}).get("dataset") or ""):
        data["datasets"] = [dataset]
    base = facts.get("generator", {}).get("settings", {}).get("init_from")
    if base and "/" in base:
        data["base_model"] = base
    metrics = all_metrics(facts)
    if metrics:
        dataset = public_dataset(facts.get("data", {}).get("dataset"))
        data["model_name"] = repo_id.rpartition("/")[2]
        data["eval_results"] = [
            EvalResult(task, dataset, dataset, name, round(value, 5), dataset_split="test", metric_name=label)
            for name, (label, value) in metrics.items()
        ]
    return data


def all_metrics(facts: dict) -> dict[str, tuple[str, float]]:
    measured = facts.get("generator", {}).get("metrics", {}) | facts.get("tokenizer", {}).get("metrics", {})
    return {name: (label, measured[name]) for name, (label, _) in METRICS.items() if name in measured}


def metric_rows(facts: dict) -> list[tuple[str, str]]:
    return [(label, format(value, METRICS[name][1])) for name, (label, value) in all_metrics(facts).items()]


def evaluation_text(report: dict) -> str:
    """The numbers of an evaluation, what to know about them, and where the rest is."""
    rest = "Settings and more are in its [report](evaluation/report.md)."
    return "\n\n".join(part for part in (markdown_summary(report), markdown_notes(report), rest) if part)


def public_dataset(name: str | None) -> str:
    return name or "a dataset that is not stated"


def data_text(facts: dict) -> str:
    if "data" not in facts:
        return "Not stated."
    rows = facts.get("codes", {}).get("rows", {})
    counts = f", {rows['train']:,} images for training and {rows.get('test', 0):,} for testing" if rows else ""
    return f"The images of {linked(public_dataset(facts['data'].get('dataset')))}{counts}."


def linked(dataset: str) -> str:
    """A dataset's name, for a Hub id as a link."""
    return f"[{dataset}](https://huggingface.co/datasets/{dataset})" if "/" in dataset else dataset


def limits_text(facts: dict) -> str:
    return (
        "It draws what resembles its training data, and nothing else well. Like any model of images it repeats the "
        "biases of that data, and may draw something close to an image in it."
    )
