"""DALL-E 2's parts on the Hub: a CLIP, priors, prior and decoder as one, and a classifier that guides."""

import json
import shutil

import pytest
import torch
from fake_hub import fake_hub
from hub_user import User
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_unclip import build_decoder, build_prior_pipeline, build_unclip, save_clip
from typer.testing import CliRunner

from llamagen_cli import app
from llamagen_hf.diffusion.noisy_classifier import NoisyClassifier
from llamagen_hf.families import load_pipeline
from llamagen_hf.publishing.cards import write_card
from llamagen_hf.publishing.publications import open_publication
from llamagen_hf.publishing.publish import load, sheet_conditions


# For a process of its own: publishes folders, as [[folder, name, options...]].
PUBLISH = """
import json, sys
from typer.testing import CliRunner
from llamagen_cli import app

for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, ["publish", *arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
print("[]")
"""
# What each of the four gives, from the places it is loaded from; also for a process of its own.
USE = """
import json, sys, torch
from PIL import Image
from llamagen_hf import PriorDecoderPipeline
from llamagen_hf.clip import CLIPScorer
from llamagen_hf.diffusion.noisy_classifier import NoisyClassifier
from llamagen_hf.families import load_pipeline

def use(clip, prior, unclip, classifier):
    image, seed = Image.new("RGB", (16, 16), "red"), lambda: torch.Generator().manual_seed(3)
    prior, unclip = load_pipeline(prior), PriorDecoderPipeline.from_pretrained(unclip)
    for pipe in (prior, unclip):
        pipe.set_progress_bar_config(disable=True)
    return [
        CLIPScorer.from_pretrained(clip, template="{}")([image], ["a cat"]),
        prior("a cat", generator=seed()).image_embeds.tolist(),
        unclip("a cat", generator=seed(), output_type="pt").images.tolist(),
        unclip.variation(image, generator=seed(), output_type="pt").images.tolist(),
        NoisyClassifier.from_pretrained(classifier)(torch.ones(1, 3, 16, 16), 5).tolist(),
    ]

"""
LOAD = USE + "print(json.dumps(use(*json.loads(sys.argv[1]))))"
# The same of an autoregressive prior, by itself and within a pipeline, with its codes.
USE_CODES = """
import json, sys, torch
from PIL import Image
from llamagen_hf import EmbeddingPriorPipeline, PriorDecoderPipeline

def use(prior, unclip):
    image, seed = Image.new("RGB", (16, 16), "red"), lambda: torch.Generator().manual_seed(3)
    prior, unclip = EmbeddingPriorPipeline.from_pretrained(prior), PriorDecoderPipeline.from_pretrained(unclip)
    for pipe in (prior, unclip, unclip.prior):
        pipe.set_progress_bar_config(disable=True)
    embeds = prior("a cat", guidance_scale=2.0, generator=seed()).image_embeds
    drawn = unclip("a cat", prior_guidance_scale=2.0, generator=seed(), output_type="pt")
    again = unclip.redraw(drawn.parameters[0], output_type="pt").images
    varied = unclip.variation(image, generator=seed(), output_type="pt").images
    codes = [quantizer.encode(embeds.float()) for quantizer in (prior.quantizer, unclip.prior.quantizer)]
    return [each.tolist() for each in (embeds, drawn.images, again, varied, *codes)]

"""
LOAD_CODES = USE_CODES + "print(json.dumps(use(*json.loads(sys.argv[1]))))"
NAMES = ("clip", "prior", "unclip", "classifier")
METRICS = {
    "clip": {"test_loss": 1.5, "test_r_precision": 0.172},
    "prior": {"test_cosine": 0.79, "test_text_cosine": 0.31, "test_retrieval": 0.29},
    "classifier": {"test_loss": 1.1, "test_accuracy_0": 0.9, "test_accuracy_750": 0.4},
    "diffusion": {"test_loss": 0.05},
}


def build_classifier() -> NoisyClassifier:
    torch.manual_seed(0)
    sizes = {"block_out_channels": [8, 16], "layers_per_block": [1, 1], "attention_levels": [1]}
    return NoisyClassifier(["round", "square"], image_size=16, attention_head_dim=8, **sizes).eval()


def add_record(folder, section):
    settings = {"max_train_steps": 2, "clip": "clip", "low_image_size": None}
    facts = {"data": {"dataset": "user/shapes"}, section: {"settings": settings, "metrics": METRICS[section]}}
    (folder / "training.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The four as trainings and `llamagen join` write them, with what else lies beside them."""
    root = tmp_path_factory.mktemp("parts")
    folders = {name: root / name for name in NAMES}
    save_clip(folders["clip"])
    (folders["clip"] / "log.jsonl").write_text("{}")
    (folders["clip"] / "checkpoints" / "step-1").mkdir(parents=True)
    (folders["clip"] / "checkpoints" / "step-1" / "model.safetensors").write_bytes(b"")
    build_prior_pipeline().save_pretrained(folders["prior"])
    build_classifier().save_pretrained(folders["classifier"])
    build_decoder().save_pretrained(root / "decoder")
    for name in ("clip", "prior", "classifier"):
        add_record(folders[name], name)
    add_record(root / "decoder", "diffusion")
    result = CliRunner().invoke(app, ["join", *map(str, (folders["prior"], root / "decoder", folders["unclip"]))])
    assert result.exit_code == 0 and "for PriorDecoderPipeline.from_pretrained" in result.output, result.output
    return folders


def card_of(folder) -> ModelCard:
    publication = open_publication(folder)
    model = load(publication)
    conditions = sheet_conditions(publication, model if publication.draws_images else None)
    card = write_card(publication, "user/parts", model, conditions, "mit", "cc0-1.0")
    assert str(folder.parent) not in str(card) and "{{" not in card.text and "None" not in card.text
    assert "cc0-1.0" in card.text and card.data.license == "mit" and card.data.datasets == ["user/shapes"]
    return card


@pytest.mark.parametrize(
    "name, task, words",
    [
        (
            "clip",
            "zero-shot-image-classification",
            [
                'CLIPScorer.from_pretrained("user/parts", template="{}")',
                "an image of 8 x 8 pixels and a caption fit",
                "| contrastive loss in nats | 1.500 |",
                "| images whose caption is found among 100 | 17.2% |",
                "2103.00020",
            ],
        ),
        (
            "prior",
            "feature-extraction",
            [
                'prior = EmbeddingPriorPipeline.from_pretrained("user/parts")\nembeds = prior("a red apple")',
                "| reads | a prompt of at most 12 tokens |",
                "| draws | an embedding of 8 numbers, of length 1 |",
                "| `num_inference_steps` | 5 |",
                "| drawn embeddings, cosine to those of the images | 0.790 |\n| ... of the captions' own",
                "2204.06125",
            ],
        ),
        (
            "unclip",
            "text-to-image",
            [
                'pipe = PriorDecoderPipeline.from_pretrained("user/parts")',
                "variations",
                "| `prior_num_candidates` | 2 |",
                "| prior: drawn embeddings, images that they find | 29.0% |",
                "| decoder: loss | 0.0500 |",
                "2204.06125",
            ],
        ),
        (
            "classifier",
            "image-classification",
            [
                'ClassifierGuide.from_pretrained("user/parts", labels=["round"])',
                "round, square",
                "| ... at timestep 750 | 40.0% |",
                "2105.05233",
            ],
        ),
    ],
)
def test_cards_say_what_each_part_is(folders, name, task, words):
    card = card_of(folders[name])
    assert card.data.pipeline_tag == task
    assert [each for each in words if each not in card.text] == [], card.text
    assert card.data.eval_results and '"max_train_steps": 2' in card.text


def test_only_what_belongs_to_a_clip_is_uploaded(folders):
    names = set(open_publication(folders["clip"]).files)
    assert {"config.json", "model.safetensors", "training.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.startswith(("checkpoints", "log"))]


def test_what_cannot_be_published_is_one_sentence(folders, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(OSError, match="of class 'LlamaForCausalLM'; of models by themselves only CLIPModel and Noisy"):
        open_publication(other)
    (other / "config.json").write_text('{"architectures": ')
    with pytest.raises(OSError, match="config.json is damaged"):
        open_publication(other)
    for name, file in (("clip", "model"), ("classifier", "diffusion_pytorch_model")):
        folder = shutil.copytree(folders[name], tmp_path / name)
        weights = load_file(folder / f"{file}.safetensors")
        gone = sorted(weights)[-1]
        save_file({key: value for key, value in weights.items() if key != gone}, folder / f"{file}.safetensors")
        with pytest.raises((OSError, ValueError), match=gone.rpartition(".")[2]):
            load(open_publication(folder))
        (folder / f"{file}.safetensors").unlink()
        with pytest.raises(OSError, match="is incomplete: there are no weights"):
            open_publication(folder)
    bare = shutil.copytree(folders["clip"], tmp_path / "bare", ignore=shutil.ignore_patterns("*process*", "token*"))
    with pytest.raises(OSError, match="There is no CLIP model with a processor"):
        load(open_publication(bare))


def test_a_prior_loads_and_draws_no_images_for_commands(folders, tmp_path):
    assert type(load_pipeline(folders["prior"])).__name__ == "EmbeddingPriorPipeline"
    arguments = ["generate", "a cat", "--checkpoint", str(folders["prior"]), "--output", str(tmp_path / "a.png")]
    result = CliRunner().invoke(app, arguments)
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and "holds a prior, which draws embeddings and no images; join it with" in said
    with pytest.raises(OSError, match="draws embeddings and no images"):
        load_pipeline(folders["prior"], draws="images")


@pytest.mark.parametrize(
    "name, words",
    [
        ("clip", ["Two encoders", "8 wide", "at most 12 tokens"]),
        ("prior", ["8 wide, denoised by 1 layers, DDPMScheduler", "text, 12 positions", "num_inference_steps 5"]),
        ("unclip", ["prior's embeddings:", "decoder's image:", "16x16 pixels", "text, 1 positions of width 8"]),
        ("classifier", ["2: round, square", "16x16 pixels under any noise"]),
    ],
)
def test_info_says_what_they_are(folders, name, words):
    result = CliRunner().invoke(app, ["info", "--checkpoint", str(folders[name])])
    assert result.exit_code == 0 and [each for each in words if each not in result.output] == [], result.output


def test_info_on_codes_and_on_what_it_does_not_know(tmp_path):
    build_prior_pipeline("autoregressive", image_encoder=False).save_pretrained(tmp_path / "prior")
    said = CliRunner().invoke(app, ["info", "--checkpoint", str(tmp_path / "prior")]).output
    assert "written as 4 codes of 16 by 2 layers" in said and "no, it has no image encoder" in said
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    result = CliRunner().invoke(app, ["info", "--checkpoint", str(tmp_path)])
    assert result.exit_code == 1 and "a model of class 'VQModel', and no checkpoint" in " ".join(result.output.split())


def test_join_refuses_what_does_not_belong_together(folders, tmp_path):
    def refusal(*paths) -> str:
        result = CliRunner().invoke(app, ["join", *map(str, paths)])
        assert result.exit_code == 1, result.output
        return " ".join(result.output.split())

    assert "`decoder` must be a" in refusal(folders["prior"], folders["unclip"], tmp_path / "out")
    decoder = folders["prior"].parent / "decoder"
    (tmp_path / "full").mkdir()
    assert "holds something else" in refusal(folders["prior"], decoder, tmp_path / "full")
    assert "holds another pipeline" in refusal(folders["prior"], decoder, folders["prior"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_saved_equals_published_equals_loaded_offline(folders, tmp_path):
    with fake_hub() as hub:
        hub.needs_token = True
        user = User(hub, tmp_path / "home")
        Image.new("RGB", (64, 64)).save(folders["unclip"] / "contact_sheet.png")  # drawing one is a test of its own
        commands = [[str(folders[name]), f"user/{name}"] for name in NAMES]
        user.codes(PUBLISH, json.dumps([*commands, commands[0]]))  # a CLIP over its own earlier version
        assert len(hub.repos["user/clip"]) == 2
        for name in NAMES:
            files = hub.repos[f"user/{name}"][-1]
            assert [path for path, content in files.items() if str(tmp_path.parent).encode() in content] == []
            assert ("contact_sheet.png" in files) == (name == "unclip") and "README.md" in files
        namespace = {}
        exec(USE, namespace)
        expected = namespace["use"](*(folders[name] for name in NAMES))
        published = json.dumps([f"user/{name}" for name in NAMES])
        assert user.codes(LOAD, published) == expected
        assert user.codes(LOAD, published, HF_HUB_OFFLINE="1") == expected
        saved = build_unclip()("a cat", generator=torch.Generator().manual_seed(3), output_type="pt").images
        torch.testing.assert_close(torch.tensor(expected[2]), saved)
        hub.repos["user/other"] = [{"config.json": b'{"architectures": ["LlamaForCausalLM"]}'}]
        refused = {
            (folders["clip"], "user/other"): "exists and holds something else",
            (folders["clip"], "user/classifier"): "exists and holds something else",
            (folders["prior"], "user/prior", "--space"): "A Space shows a pipeline that draws images",
        }
        for error, message in zip(user.refusals(*refused), refused.values(), strict=True):
            assert message in error


@pytest.mark.slow
def test_an_autoregressive_prior_comes_back_from_the_hub(user, tmp_path):
    """Its quantizer is a class of this package, alone and within a pipeline whose decoder writes codes, too."""
    unclip = build_unclip("autoregressive", "autoregressive")
    folders = [tmp_path / "prior", tmp_path / "unclip"]
    for pipe, folder in zip((unclip.prior, unclip), folders, strict=True):
        pipe.save_pretrained(folder)
        add_record(folder, "prior")
    Image.new("RGB", (64, 64)).save(folders[1] / "contact_sheet.png")
    namespace = {}
    exec(USE_CODES, namespace)
    expected = namespace["use"](*folders)
    assert expected[1] == expected[2] != expected[3] and expected[4] == expected[5]
    words = ("| kind | autoregressive |", "| `prior_top_k` |")
    for folder, word in zip(folders, words, strict=True):
        user.publish(folder, f"user/{folder.name}")
        files = user.hub.repos[f"user/{folder.name}"][-1]
        assert [path for path in files if path.endswith("quantizer/diffusion_pytorch_model.safetensors")]
        card = files["README.md"].decode()
        assert word in card and str(tmp_path) not in card
    published = json.dumps(["user/prior", "user/unclip"])
    assert user.codes(LOAD_CODES, published) == expected
    assert user.codes(LOAD_CODES, published, HF_HUB_OFFLINE="1") == expected
