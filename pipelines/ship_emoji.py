"""Pack the trained emoji pipeline as the checkpoint that ships with the package.

python pipelines/ship_emoji.py --config pipelines/recipes/emoji.yaml [--vq_model FOLDER] [--output FOLDER]

The weights are saved in half precision. The card's numbers and the contact sheet come from those weights.
"""

import argparse
import shutil
from pathlib import Path

import torch

from llamagen_hf import AutoregressiveImagePipeline, LlamaGenVQModel
from llamagen_hf.conditioning.text import tokenize_prompts
from llamagen_hf.data.fingerprint import vq_model_fingerprint
from llamagen_hf.data.loader import batches_once
from llamagen_hf.data.samples import ImageSamples, stack_images
from llamagen_hf.data.source import DataConfig
from llamagen_hf.llamagen.conversion import save_complete
from llamagen_hf.llamagen.training.codes import CodeCollator, CodeSamples, load_codes
from llamagen_hf.llamagen.training.generator_config import GeneratorTrainingConfig
from llamagen_hf.llamagen.training.generator_models import ConditionToCodes, mean_loss
from llamagen_hf.llamagen.training.vq_trainer import evaluate_tokenizer
from llamagen_hf.loading.checkpoint import EMOJI_CHECKPOINT
from llamagen_hf.publishing.publications import SHEET
from llamagen_hf.publishing.publish import generate_sheet
from llamagen_hf.training.recipe import parse_recipe


TRAIN_CAPTIONS, TEST_CAPTIONS = 40, 20
LOSS_ROWS = 800  # at most, of each split, at even distances


def evenly(captions: list[str], count: int) -> list[str]:
    return [captions[i * len(captions) // count] for i in range(count)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config", required=True, help="The recipe of the run.")
    arguments.add_argument("--dataset", help="The images, if not where the recipe says.")
    arguments.add_argument("--vq_model", help="An image tokenizer with a better decoder for the same codes.")
    arguments.add_argument("--output", type=Path, default=EMOJI_CHECKPOINT, help="Replaced, if it is a checkpoint.")
    own = arguments.parse_args()
    recipe = ["--config", own.config]
    images = [*recipe, "--dataset", own.dataset] if own.dataset else recipe
    (data,) = parse_recipe(__doc__, ("data", DataConfig), args=images)
    (config,) = parse_recipe(__doc__, ("generator", GeneratorTrainingConfig), args=recipe)
    if own.output.exists() and not (own.output / "model_index.json").is_file():
        raise SystemExit(f"{own.output} exists and is not a checkpoint.")

    pipe = AutoregressiveImagePipeline.from_pretrained(config.output_dir)
    fingerprint = vq_model_fingerprint(pipe.vq_model)
    if own.vq_model is not None:
        pipe.vq_model = LlamaGenVQModel.from_pretrained(own.vq_model)
        if vq_model_fingerprint(pipe.vq_model) != fingerprint:
            raise SystemExit(f"{own.vq_model} does not encode images to the codes that the generator was trained on.")
    splits = {split: load_codes(config.codes_dir, split, fingerprint) for split in ("train", "test")}
    partial_output = own.output.with_name(f".{own.output.name}-new")
    shutil.rmtree(partial_output, ignore_errors=True)
    save_complete(pipe.to(torch.float16), partial_output)

    pipe = AutoregressiveImagePipeline.from_pretrained(partial_output)
    captions = evenly(splits["train"]["caption"], TRAIN_CAPTIONS) + evenly(splits["test"]["caption"], TEST_CAPTIONS)
    sheet = generate_sheet(pipe, captions, columns=10)
    sheet.quantize(256).save(partial_output / SHEET, optimize=True)

    def tokenize(captions):
        text = pipe.transformer.config
        return tokenize_prompts(pipe.tokenizer, captions, text.condition_length, text.prompt_cleaning)

    model, losses = ConditionToCodes(pipe.transformer, pipe.text_encoder).eval(), {}
    for split, rows in splits.items():
        rows = rows.select(range(0, len(rows), -(-len(rows) // LOSS_ROWS)))
        samples = CodeSamples(rows, config.caption_templates, training=False)
        batches = list(batches_once(rows, samples, CodeCollator(tokenize), 64))
        losses[f"{split}_loss"], _ = mean_loss(model, batches)
        losses[f"{split}_loss_without_prompt"], _ = mean_loss(model, batches, without_condition=True)
    images = batches_once(data.load("test"), ImageSamples(data), stack_images, 32)
    generator = pipe.transformer.config

    def millions(component):
        return sum(p.numel() for p in component.parameters()) / 1e6

    card = (Path(__file__).parent / "emoji_card.md").read_text(encoding="utf-8")
    facts = evaluate_tokenizer(pipe.vq_model, images) | losses
    (partial_output / "README.md").write_text(
        card.format(
            **facts,
            image_size=pipe.image_size,
            grid_size=generator.grid_size,
            codes=generator.vocab_size,
            train_captions=TRAIN_CAPTIONS,
            test_captions=TEST_CAPTIONS,
            sampling=pipe.sampling_settings(),
            vq_parameters=millions(pipe.vq_model),
            transformer_parameters=millions(pipe.transformer),
            text_parameters=millions(pipe.text_encoder),
            layers=generator.num_hidden_layers,
            width=generator.hidden_size,
            text_layers=pipe.text_encoder.config.num_layers,
            steps=config.max_train_steps,
            batch_size=config.batch_size,
            passes=config.max_train_steps * config.batch_size / len(splits["train"]),
        ),
        encoding="utf-8",
    )
    shutil.rmtree(own.output, ignore_errors=True)
    partial_output.rename(own.output)
    print(facts)


if __name__ == "__main__":
    main()
