"""Publishing and what comes back, against a Hub on loopback; every step in a process of its own, as at a user's."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load, save_file
from safetensors.torch import save as safetensors_bytes
from tiny import build_class_pipeline, build_text_pipeline, generators
from tiny_training import generator_config, write_codes

from llamagen_hf.evaluation.report import write_report
from llamagen_hf.families import Family
from llamagen_hf.llamagen.training.generator_trainer import train_generator
from llamagen_hf.loading.lora import lora_config
from llamagen_hf.provenance import save_png
from llamagen_hf.publishing.cards import MARKER, write_card
from llamagen_hf.publishing.publications import REPORT_FILES, Publication, open_publication
from llamagen_hf.publishing.publish import space_folder


LOAD = """
import json, sys, torch
import llamagen_hf
from diffusers import DiffusionPipeline

cls = DiffusionPipeline if sys.argv[2] == "DiffusionPipeline" else llamagen_hf.AutoregressiveImagePipeline
pipe = cls.from_pretrained(sys.argv[1], **json.loads(sys.argv[3]))
assert type(pipe) is llamagen_hf.AutoregressiveImagePipeline
codes = pipe(**json.loads(sys.argv[4]), generator=torch.Generator().manual_seed(3), output_type="codes").images
print(json.dumps(codes.tolist()))
"""

ADAPT = """
import json, sys, torch
from llamagen_hf import AutoregressiveImagePipeline

pipe = AutoregressiveImagePipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights(sys.argv[2], **json.loads((sys.argv[4:] or ["{}"])[0]))
if sys.argv[2] == "user/style":
    again = AutoregressiveImagePipeline.from_pretrained(sys.argv[1])
    again.load_loras(pipe.loras)
    assert len(pipe.loras[0]["revision"]) == 40 and again.loras == pipe.loras
codes = pipe(**json.loads(sys.argv[3]), generator=torch.Generator().manual_seed(3), output_type="codes").images
print(json.dumps(codes.tolist()))
"""


PROMPT = json.dumps({"prompt": ["a red apple", "a fish"]})


def expected_codes(pipe, condition=PROMPT):
    return pipe(**json.loads(condition), generator=generators(3)[0], output_type="codes").images.tolist()


def save(pipe, folder, **kwargs):
    pipe.save_pretrained(folder, **kwargs)
    Image.new("RGB", (64, 64)).save(folder / "contact_sheet.png")  # generating one is a test of its own
    return folder


@pytest.mark.slow
def test_publish_load_update_and_load_the_old_revision(user, tmp_path):
    first, second = build_text_pipeline(), build_text_pipeline()
    with torch.no_grad():
        second.transformer.lm_head.weight.neg_()
    folder = save(first, tmp_path / "pipe")
    (folder / "samples").mkdir()
    (folder / "samples" / "step.png").write_bytes(b"")
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"")
    assert f"{user.hub.url}/user/tiny" in user.publish(folder, "user/tiny", "--license", "mit")
    (files,) = user.hub.repos["user/tiny"]
    assert "model_index.json" in files and not [name for name in files if "step" in name]
    assert [name for name, content in files.items() if str(tmp_path).encode() in content] == []

    expected, options = expected_codes(first), ("AutoregressiveImagePipeline", "{}", PROMPT)
    assert user.codes(LOAD, "user/tiny", "DiffusionPipeline", "{}", PROMPT) == expected
    for name in ("AutoregressiveImagePipeline", "DiffusionPipeline"):
        assert user.codes(LOAD, "user/tiny", name, "{}", PROMPT, HF_HUB_OFFLINE="1") == expected

    folder = save(second, tmp_path / "second")
    user.publish(folder, "user/tiny")
    assert len(user.hub.repos["user/tiny"]) == 2  # each time one commit
    assert user.codes(LOAD, "user/tiny", *options) == expected_codes(second) != expected
    old = json.dumps({"revision": user.hub.sha(user.hub.repos["user/tiny"][:1])})
    assert user.codes(LOAD, "user/tiny", "AutoregressiveImagePipeline", old, PROMPT) == expected


@pytest.mark.slow
def test_files_deleted_here_are_deleted_there_and_others_stay(user, tmp_path):
    folder = save(build_text_pipeline(), tmp_path / "pipe")
    (folder / "vq_model" / "notes.json").write_text("{}")
    user.publish(folder, "user/tiny")
    user.hub.repos["user/tiny"].append(user.hub.repos["user/tiny"][0] | {"demo.mp4": b"a film"})
    (folder / "vq_model" / "notes.json").unlink()
    user.publish(folder, "user/tiny")
    files = user.hub.repos["user/tiny"][-1]
    assert "vq_model/notes.json" not in files and files["demo.mp4"] == b"a film"


@pytest.mark.slow
def test_half_precision_variants(user, tmp_path):
    folder = tmp_path / "pipe"
    pipe = build_text_pipeline()
    save(pipe, folder)
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    user.publish(folder, "user/both")
    rounded = expected_codes(pipe.to(torch.float32))
    variant = json.dumps({"variant": "fp16"})
    assert user.codes(LOAD, "user/both", "AutoregressiveImagePipeline", variant, PROMPT) == rounded
    fetched = [line.rpartition("/")[2] for line in user.hub.requests if line.startswith("GET /user/both/resolve")]
    assert "model.fp16.safetensors" in fetched and "model.safetensors" not in fetched
    offline = {"HF_HUB_OFFLINE": "1"}
    assert user.codes(LOAD, "user/both", "AutoregressiveImagePipeline", variant, PROMPT, **offline) == rounded

    only = save(pipe.to(torch.float16), tmp_path / "only", variant="fp16")
    user.publish(only, "user/only")
    assert user.codes(LOAD, "user/only", "AutoregressiveImagePipeline", variant, PROMPT) == rounded


@pytest.mark.slow
def test_the_card_says_what_it_is(user, tmp_path):
    user.publish(save(build_class_pipeline(), tmp_path / "pipe"), "user/fish", "--license", "cc-by-4.0")
    card = ModelCard(user.hub.repos["user/fish"][-1]["README.md"].decode())
    assert card.data.library_name == "diffusers" and card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "unconditional-image-generation" and "llamagen" in card.data.tags
    assert 'from_pretrained("user/fish")' in card.text and "pipe(class_labels=0)" in card.text
    assert "2406.06525" in card.text and "![" in card.text and "{{" not in card.text
    transformer = sum(p.numel() for p in build_class_pipeline().transformer.parameters())
    assert f"{transformer / 1e6:.1f}M" in card.text


REPORT = {"count": 50, "reference": {"name": "images"}, "metrics": {"fid": 3.39, "kid": 0.0005, "kid_std": 0.0002}}


@pytest.mark.slow
def test_publishing_brings_the_report(user, tmp_path):
    folder = save(build_class_pipeline(), tmp_path / "pipe")
    write_report(folder / "evaluation", REPORT)
    user.publish(folder, "user/fish")
    files = user.hub.repos["user/fish"][-1]
    card = ModelCard(files["README.md"].decode())
    assert {result.metric_type for result in card.data.eval_results} == {"fid", "kid"}
    assert card.data.model_name == "fish" and set(REPORT_FILES) < set(files)
    assert [name for name, content in files.items() if str(tmp_path).encode() in content] == []


@pytest.mark.slow
def test_a_deleted_report_is_deleted_there(user, tmp_path):
    folder = save(build_class_pipeline(), tmp_path / "pipe")
    write_report(folder / "evaluation", REPORT)
    user.publish(folder, "user/fish")
    shutil.rmtree(folder / "evaluation")
    user.publish(folder, "user/fish")
    assert not set(REPORT_FILES) & set(user.hub.repos["user/fish"][-1])
    assert ModelCard(user.hub.repos["user/fish"][-1]["README.md"].decode()).data.eval_results is None


@pytest.mark.slow
def test_a_sheet_is_generated_if_there_is_none(user, tmp_path):
    build_class_pipeline().save_pretrained(tmp_path / "pipe")
    user.publish(tmp_path / "pipe", "user/sheet")
    user.publish(tmp_path / "pipe", "user/plain", "--no-draw")
    assert "contact_sheet.png" not in user.hub.repos["user/plain"][-1]
    assert "![" not in user.hub.repos["user/plain"][-1]["README.md"].decode()
    (tmp_path / "sheet.png").write_bytes(user.hub.repos["user/sheet"][-1]["contact_sheet.png"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 136, 3 * 172)  # ten classes


@pytest.mark.slow
def test_what_a_person_wrote_is_kept(user, tmp_path):
    folder = save(build_text_pipeline(), tmp_path / "pipe")
    user.publish(folder, "user/tiny")
    generated = user.hub.repos["user/tiny"][-1]["README.md"]
    assert b"llamagen publish" in generated
    user.hub.repos["user/tiny"].append(user.hub.repos["user/tiny"][-1] | {"README.md": b"# Mine\n\nwritten there\n"})
    user.publish(folder, "user/tiny")
    there = ModelCard(user.hub.repos["user/tiny"][-1]["README.md"].decode())
    assert "written there" in there.text and there.data.library_name == "diffusers"
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [fish]\n---\n# Mine\n\nwritten here\n")
    user.publish(folder, "user/tiny")
    here = ModelCard(user.hub.repos["user/tiny"][-1]["README.md"].decode())
    assert "written here" in here.text and here.data.license == "mit" and here.data.tags[0] == "fish"
    assert "llamagen" in here.data.tags and here.data.pipeline_tag == "text-to-image"


@pytest.mark.slow
def test_an_interrupted_upload_leaves_nothing_and_can_be_continued(user, tmp_path):
    folder = save(build_text_pipeline(), tmp_path / "pipe")
    user.hub.lfs_threshold, user.hub.lfs_limit = 5000, 1
    assert "broke off" in user.refusal(folder, "user/tiny")
    assert user.hub.repos["user/tiny"] == []  # no commit
    (sent,) = user.hub.lfs_objects
    user.hub.lfs_limit = float("inf")
    user.hub.requests.clear()
    user.publish(folder, "user/tiny")
    assert f"PUT {sent}" not in user.hub.requests and len(user.hub.lfs_objects) > 1
    assert user.codes(LOAD, "user/tiny", "AutoregressiveImagePipeline", "{}", PROMPT) == expected_codes(
        build_text_pipeline()
    )


@pytest.mark.slow
def test_private_repositories_and_spaces(user, tmp_path):
    folder = save(build_text_pipeline(), tmp_path / "pipe")
    printed = user.publish(folder, "user/secret", "--private", "--space")
    assert user.hub.private == {"user/secret", "spaces/user/secret"} and printed.count("Published") == 2
    (files,) = user.hub.repos["spaces/user/secret"]
    assert set(files) == {"app.py", "README.md", "requirements.txt"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.title == "secret" and card.data.models == ["user/secret"] and card.data.sdk == "gradio"
    assert user.hub.variables["spaces/user/secret"] == {"LLAMAGEN_CHECKPOINT": "user/secret"}
    user.publish(folder, "user/secret", "--space")
    assert len(user.hub.repos["spaces/user/secret"]) == 2
    user.publish(folder, "user/open")
    assert "exists and is public" in user.refusal(folder, "user/open", "--private")


def test_the_spaces_files_are_found_in_a_checkout():
    assert {"app.py", "README.md", "requirements.txt"} <= {path.name for path in space_folder().iterdir()}


@pytest.mark.slow
def test_a_space_that_is_another_stops_it_all(user, tmp_path):
    folder = save(build_class_pipeline(), tmp_path / "pipe")
    user.hub.repos["spaces/user/tiny"] = [{"app.py": b"import gradio"}]
    assert "The Space user/tiny exists and holds something else" in user.refusal(folder, "user/tiny", "--space")
    assert "user/tiny" not in user.hub.repos and len(user.hub.repos["spaces/user/tiny"]) == 1


@pytest.mark.slow
def test_an_unknown_revision_is_a_sentence(user, tmp_path):
    user.publish(save(build_class_pipeline(), tmp_path / "pipe"), "user/tiny")
    script = (
        "import sys; from llamagen_hf import AutoregressiveImagePipeline as P\n"
        "try:\n    P.from_pretrained('user/tiny', revision='v9')\n"
        "except OSError as error:\n    print(error)"
    )
    assert "The repository 'user/tiny' has no revision 'v9'." in user.run("-c", script).stdout


@pytest.mark.slow
def test_refusals_are_one_sentence_and_publish_nothing(user, tmp_path):
    folder = save(build_text_pipeline(), tmp_path / "pipe")
    user.hub.repos["user/other"] = [{"model_index.json": b'{"_class_name": "DiTPipeline"}', "weights.bin": b""}]
    user.hub.repos["user/files"] = [{"data.csv": b""}]
    (tmp_path / "empty").mkdir()
    broken = save(build_text_pipeline(), tmp_path / "broken")
    (broken / "transformer" / "model.safetensors").write_bytes(b"cut off")
    lacking = save(build_text_pipeline(), tmp_path / "lacking")
    for path in (lacking / "vq_model").iterdir():
        path.unlink()
    (lacking / "vq_model").rmdir()
    leaking = save(build_text_pipeline(), tmp_path / "leaking")
    (leaking / "vq_model" / "notes.json").write_text(json.dumps({"seen": str(tmp_path / "images")}))

    refused = {
        (folder, "user/other"): "exists and holds something else",
        (folder, "user/files"): "user/files exists and holds something else (data.csv, ...)",
        (folder, "user/a b"): "'user/a b' is not the name of a repository",
        (tmp_path / "absent", "user/tiny"): "There is no folder",
        (tmp_path / "empty", "user/tiny"): "can't be published",
        (broken, "user/tiny"): "damaged",
        (lacking, "user/tiny"): "incomplete: there is no vq_model",
        (leaking, "user/tiny"): "vq_model/notes.json holds the path",
    }
    for error, message in zip(user.refusals(*refused), refused.values(), strict=True):
        assert message in error
    for environment, message in [  # which is read when Python starts
        ({"HF_TOKEN": ""}, "Publishing needs a token"),
        ({"HF_TOKEN": "hf_wrong"}, "The Hub does not know this token"),
        ({"HF_TOKEN": "hf_read"}, "This token may not write to user/tiny"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "can't be reached"),
    ]:
        assert message in user.refusal(folder, "user/tiny", **environment)
    assert user.hub.repos.get("user/tiny", []) == []
    assert len(user.hub.repos["user/other"]) == len(user.hub.repos["user/files"]) == 1


def write_secret(path: Path, secret: str) -> None:
    """Note something down in a file of some format where people may overlook it."""
    if path.suffix == ".safetensors":
        save_file({"weight": torch.zeros(2)}, path, metadata={"seen": secret})
    elif path.suffix == ".png":
        save_png(Image.new("RGB", (9, 9)), path, {"checkpoint": secret})
    elif path.suffix == ".parquet":
        rows = pa.table({"codes": [[1, 2]], "image": [{"bytes": b"", "path": secret}]})
        pq.write_table(rows.replace_schema_metadata({}), path, compression="zstd")
    else:
        path.write_text(secret)


@pytest.mark.parametrize(
    "name", ["vq_model/diffusion_pytorch_model.safetensors", "contact_sheet.png", "vq_model/x.txt"]
)
def test_paths_are_found_in_every_kind_of_file(tmp_path, name):
    folder = save(build_class_pipeline(), tmp_path / "pipe")
    write_secret(folder / name, str(tmp_path / "images"))
    with pytest.raises(OSError, match=f"{name} holds the path '{tmp_path}' of this machine"):
        open_publication(folder)
    write_secret(folder / name, "user/images")
    assert open_publication(folder).files[name] == folder / name


@pytest.mark.parametrize("place", ["strings", "metadata"])
def test_paths_are_found_in_tables(tmp_path, place):
    folder = tmp_path / "codes"
    write_codes(tmp_path)
    assert "train-00000.parquet" in open_publication(folder).files
    if place == "strings":
        write_secret(folder / "train-00001.parquet", str(tmp_path / "images"))
    else:
        table = pa.table({"codes": [[1]]}).replace_schema_metadata({"bad_rows": str(tmp_path / "images")})
        pq.write_table(table, folder / "train-00001.parquet")
    with pytest.raises(OSError, match="train-00001.parquet holds the path"):
        open_publication(folder)


@pytest.mark.parametrize("name", ["contact_sheet.png", "vq_model/diffusion_pytorch_model.safetensors"])
def test_damaged_files_are_named(tmp_path, name):
    folder = save(build_class_pipeline(), tmp_path / "pipe")
    (folder / name).write_bytes(b"cut off")
    with pytest.raises(OSError, match=f"is damaged: {name}"):
        open_publication(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer, codes, a pipeline and an adapter, as the trainings write them."""
    root = tmp_path_factory.mktemp("trained")
    write_codes(root)
    settings = {"max_train_steps": 2, "sampling_defaults": {"top_k": 5}}
    train_generator(generator_config(root / "pipeline", root / "tokenizer", root / "codes", **settings))
    lora = settings | {"init_from": str(root / "pipeline"), "lora_rank": 2}
    train_generator(generator_config(root / "adapter", root / "tokenizer", root / "codes", **lora))
    return root


def assert_no_paths(files, root):
    for place in (root, Path.home(), Path.cwd()):
        assert [name for name, content in files.items() if str(place).encode() in content] == []


@pytest.mark.slow
def test_a_trained_pipeline_brings_its_facts(user, trained):
    user.publish(trained / "pipeline", "user/shapes")
    files = user.hub.repos["user/shapes"][-1]
    assert_no_paths(files, trained)
    assert not [name for name in files if name.startswith(("checkpoints", "samples", "logs"))]
    card = ModelCard(files["README.md"].decode())
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    facts = json.loads((trained / "pipeline" / "training.json").read_text())
    assert results["test_loss"] == pytest.approx(facts["generator"]["metrics"]["test_loss"], abs=1e-4)
    assert {"test_psnr", "test_ssim", "test_loss_without_condition"} <= set(results)
    assert {result.dataset_name for result in card.data.eval_results} == {"shapes"}
    assert "shapes, 20 images for training and 8 for testing" in card.text
    assert '"max_train_steps": 2' in card.text and facts["examples"][0] in card.text
    assert [entry["text"] for entry in card.data.widget] == facts["examples"][:5]
    assert "contact_sheet.png" in files


@pytest.mark.slow
def test_an_adapter_loads_by_id(user, trained):
    user.publish(trained / "pipeline", "user/shapes")
    user.publish(trained / "adapter", "user/style")
    files = user.hub.repos["user/style"][-1]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert_no_paths(files, trained)
    assert 'load_lora_weights("user/style")' in files["README.md"].decode()
    by_id = user.codes(ADAPT, "user/shapes", "user/style", PROMPT)
    assert by_id == user.codes(ADAPT, trained / "pipeline", trained / "adapter", PROMPT)
    assert by_id == user.codes(ADAPT, "user/shapes", "user/style", PROMPT, HF_HUB_OFFLINE="1")
    # An adapter that is changed later does not replace the one that an image was generated with.
    repo = user.hub.repos["user/style"]
    old = json.dumps({"revision": user.hub.sha(repo)})
    weights = {name: -value for name, value in load(repo[-1]["adapter_model.safetensors"]).items()}
    repo.append(repo[-1] | {"adapter_model.safetensors": safetensors_bytes(weights)})
    assert user.codes(ADAPT, "user/shapes", "user/style", PROMPT, old) == by_id
    assert "a pipeline" in user.refusal(trained / "adapter", "user/style", "--space")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["user/other", "user/absent"])
def test_an_adapter_of_a_base_that_is_not_ours_is_still_published(user, trained, tmp_path, base):
    folder = shutil.copytree(trained / "adapter", tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    user.hub.repos["user/other"] = [{"model_index.json": b'{"_class_name": "DiTPipeline"}'}]
    user.publish(folder, "user/style")
    card = ModelCard(user.hub.repos["user/style"][-1]["README.md"].decode())
    assert card.data.base_model == base and f'AutoregressiveImagePipeline.from_pretrained("{base}")' in card.text


@pytest.mark.parametrize(
    "base, named, loaded",
    [
        ("user/base", "user/base", "user/base"),
        ("emoji", None, "emoji"),
        ("emoji_upsampler", None, "emoji_upsampler"),
        ("/data/models/base", None, "the checkpoint that it was trained on"),
        (None, None, "the checkpoint that it was trained on"),
    ],
)
def test_an_adapters_base_is_named_unless_it_is_a_folder(tmp_path, base, named, loaded):
    pipe = build_text_pipeline()
    pipe.transformer.add_adapter(lora_config(2))
    pipe.transformer.peft_config["default"].base_model_name_or_path = base
    pipe.transformer.save_pretrained(tmp_path)
    publication = open_publication(tmp_path)
    card = write_card(publication, "user/style", None, [], None, None)
    assert card.data.base_model == named
    assert f'from_pretrained("{loaded}")' in card.text
    assert not any("/data" in str(content) for content in (publication.files["adapter_config.json"], card))


def test_the_card_of_a_new_family_needs_one_entry_in_the_table(tmp_path):
    family = Family(
        pipeline="PixelDiffusionPipeline",
        name="Pixels",
        reference="Doe 2025",
        summary="It denoises {pipe.image_size} pixels.",
        tags=("pixels", "diffusion"),
        citation="@article{doe2025pixels}",
    )
    pipe = build_text_pipeline()
    card = write_card(Publication(tmp_path, "pipeline", family), "user/pixels", pipe, ["a cat"], None)
    assert "Pixels (Doe 2025). It denoises 8 pixels." in card.text
    assert 'PixelDiffusionPipeline.from_pretrained("user/pixels")' in card.text and 'pipe("a cat")' in card.text
    assert "```bibtex\n@article{doe2025pixels}\n```" in card.text
    assert card.data.tags == ["pixels", "diffusion", "text-to-image"]
    assert "llama" not in str(card).lower().replace("llamagen-hf", "").replace("llamagen_hf", "").replace(MARKER, "")
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    card = write_card(Publication(tmp_path, "adapter", family), "user/style", None, [], None)
    assert "PixelDiffusionPipeline.from_pretrained" in card.text and "@article{doe2025pixels}" in card.text


@pytest.mark.slow
def test_the_card_says_whose_images_they_are(user, trained, tmp_path):
    folder = shutil.copytree(trained / "pipeline", tmp_path / "pipe", ignore=shutil.ignore_patterns("checkpoints"))
    facts = json.loads((folder / "training.json").read_text())
    facts["data"]["dataset"] = "user/shapes"
    (folder / "training.json").write_text(json.dumps(facts))
    user.hub.repos["datasets/user/shapes"] = [{"README.md": b"---\nlicense: cc0-1.0\n---\n# Shapes\n"}]
    user.publish(folder, "user/model", "--no-draw")
    card = ModelCard(user.hub.repos["user/model"][-1]["README.md"].decode())
    assert card.data.datasets == ["user/shapes"] and "Their licence: cc0-1.0." in card.text
    assert "(https://huggingface.co/datasets/user/shapes)" in card.text
    card = write_card(open_publication(trained / "codes"), "user/codes", None, [], None, "mit")
    assert "Their licence: mit." in card.text
    card = write_card(open_publication(trained / "codes"), "user/codes", None, [], None, None)
    assert "Their licence is not stated here." in card.text


@pytest.mark.slow
def test_codes_become_a_dataset_to_train_on(user, trained, tmp_path):
    user.publish(trained / "codes", "user/shape-codes")
    files = user.hub.repos["datasets/user/shape-codes"][-1]
    assert {"README.md", "codes.json", "train-00000.parquet", "test-00000.parquet"} <= set(files)
    assert_no_paths(files, trained)
    card = files["README.md"].decode()
    assert "20 of the train split and 8 of the test split" in card and "--codes_dir user/shape-codes" in card
    script = (
        "import sys; from llamagen_hf.llamagen.training.codes import load_codes, read_codes_info\n"
        "info = read_codes_info(sys.argv[1])\n"
        "print(len(load_codes(sys.argv[1], 'train', info['vq_model_fingerprint'])))"
    )
    assert user.codes(script, "user/shape-codes") == 20
    assert user.codes(script, "user/shape-codes", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1") == 20
