"""Images from folders, `.npz`, datasets and arrays, and statistics of them, with real files and a tiny extractor."""

import io
import zipfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_evaluation import Thumbnails

from llamagen_hf.evaluation import frechet_distance
from llamagen_hf.evaluation import statistics as statistics_module
from llamagen_hf.evaluation.images import open_images
from llamagen_hf.evaluation.npz import NpzImages, write_images
from llamagen_hf.evaluation.statistics import (
    ImageStatistics,
    compute_statistics,
    evaluate_generation,
    reference_statistics,
)


def random_images(count=12, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics_module, "cached_assets_path", lambda *_, **__: made(tmp_path / "cache"))


def made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def save_folder(folder, values):
    for index, value in enumerate(values):
        (folder / f"{index % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(value).save(folder / f"{index % 3}" / f"{index:03d}.png")
    return folder


def as_dataset(values):
    rows = []
    for value in values:
        file = io.BytesIO()
        Image.fromarray(value).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    return datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())


def test_all_sources_give_the_same_images(tmp_path):
    values = random_images()
    write_images(tmp_path / "batch.npz", values, len(values))
    as_dataset(values).to_parquet(str(tmp_path / "rows" / "test.parquet"))
    ordered = [values[i] for i in sorted(range(12), key=lambda i: (i % 3, i))]
    sources = {
        "array": values,
        "list": [Image.fromarray(value) for value in values],
        "npz": tmp_path / "batch.npz",
        "dataset": as_dataset(values),
        "parquet": str(tmp_path / "rows"),
        "folder": save_folder(tmp_path / "folder", values),
    }
    for name, source in sources.items():
        images = open_images(source)
        expected = np.stack(ordered) if name == "folder" else values
        assert len(images) == 12
        for batch_size in (1, 5, 12, 100):  # and more than once
            batches = list(images.batches(batch_size))
            assert np.array_equal(np.concatenate(batches), expected), name
            assert len(batches[0]) == min(batch_size, 12)
        assert str(tmp_path) not in images.name


def test_an_npz_is_what_numpy_writes_and_reads(tmp_path):
    values = random_images()
    np.savez(tmp_path / "theirs.npz", values, np.arange(12))  # with labels, as ADM samples classes
    assert np.array_equal(np.stack(list(NpzImages(tmp_path / "theirs.npz"))), values)
    np.savez_compressed(tmp_path / "small.npz", values)
    assert np.array_equal(np.stack(list(NpzImages(tmp_path / "small.npz"))), values)
    write_images(tmp_path / "ours.npz", iter(values), 12)
    assert np.array_equal(np.load(tmp_path / "ours.npz")["arr_0"], values)


def test_a_failed_write_leaves_no_file(tmp_path):
    values = list(random_images())
    with pytest.raises(ValueError, match="There are 12 images, not 13"):
        write_images(tmp_path / "a.npz", values, 13)
    with pytest.raises(ValueError, match=r"Image 12 is uint8 \(4, 4, 3\), the first uint8 \(8, 8, 3\)"):
        write_images(tmp_path / "a.npz", [*values, random_images(1, 4)[0]], 13)
    assert list(tmp_path.iterdir()) == []


def test_damaged_batches_are_refused(tmp_path):
    values = random_images()
    np.savez(tmp_path / "whole.npz", values)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", images=values)
    np.savez(tmp_path / "grey.npz", values[..., 0])
    np.savez(tmp_path / "alpha.npz", np.concatenate([values, values[..., :1]], axis=3))
    np.savez(tmp_path / "floats.npz", values / 255)
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    for name, message in {
        "cut": "is not an .npz file, or is damaged",
        "text": "is not an .npz file, or is damaged",
        "other": "holds no images: it has no arr_0, but images",
        "grey": r"uint8 \(12, 8, 8\); expected uint8 \(n, height, width, 3\)",
        "alpha": r"uint8 \(12, 8, 8, 4\); expected",
        "floats": r"float64 \(12, 8, 8, 3\); expected",
        "objects": "object",
        "missing": "There is no file",
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            open_images(tmp_path / f"{name}.npz")


def test_a_truncated_batch_is_named(tmp_path):
    values = random_images()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (12, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + values.tobytes()[:2000])
    with pytest.raises(OSError, match="'short.npz' is cut off: image 10 of 12 is not complete"):
        list(open_images(tmp_path / "short.npz"))


def test_unusable_images_are_named_or_skipped(tmp_path):
    folder = save_folder(tmp_path / "own", random_images())
    (folder / "broken.png").write_bytes((folder / "0" / "000.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="broken.png.*can't be read"):
        list(open_images(folder))
    images = open_images(folder, skip_bad=True)
    assert len(list(images)) == 12
    assert set(images.skipped) == {"broken.png"}
    assert len(list(images)) == 12 and len(images.skipped) == 1  # counted once


def test_grey_and_opaque_images_become_rgb():
    grey = Image.effect_noise((8, 8), 90)
    for image in (grey, grey.convert("RGBA"), grey.convert("P"), grey.convert("LA")):
        (value,) = open_images([image])
        assert np.array_equal(value, np.array(grey.convert("RGB")))


def test_images_of_several_sizes_need_one(tmp_path):
    mixed = [Image.fromarray(random_images(1, side)[0]) for side in (8, 16)]
    with pytest.raises(ValueError, match="differ in size: image 0 is 8 x 8 pixels, image 1 16 x 16; give a size"):
        list(open_images(mixed))
    assert [value.shape for value in open_images(mixed, image_size=4)] == [(4, 4, 3)] * 2


def test_other_sources_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in {
        str(tmp_path / "empty"): "can't be read",
        "./nowhere": "there is no such folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_images(source)
    for source, message in (
        (random_images().astype(np.float32), "The array is float32"),
        (random_images()[0], r"The array is uint8 \(8, 8, 3\)"),
        ([1, 2], "must hold PIL images alone"),
        ([], "There are no images"),
        (datasets.Dataset.from_dict({"text": ["a"]}), "not a dataset with a column 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_images(source)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_statistics_do_not_depend_on_batches(batch_size):
    images = open_images(random_images(40))
    found = compute_statistics(images, Thumbnails(), batch_size, progress=False)
    whole = compute_statistics(images, Thumbnails(), 40, progress=False)
    assert torch.equal(found.features, whole.features) and torch.equal(found.logits, whole.logits)
    assert frechet_distance(found.pool, whole.pool) == pytest.approx(0, abs=1e-12)
    assert found.count == 40 and found.image_size == (8, 8)


def test_saved_statistics_are_loaded_and_adms_names_are_in_them(tmp_path):
    found = compute_statistics(open_images(random_images(40)), Thumbnails(), progress=False)
    found.save(tmp_path / "statistics.npz")
    loaded = ImageStatistics.load(tmp_path / "statistics.npz")
    other = compute_statistics(open_images(random_images(40, seed=1)), Thumbnails(), progress=False)
    assert evaluate_generation(found, other) == pytest.approx(evaluate_generation(loaded, other), rel=1e-9)
    assert (loaded.name, loaded.count, loaded.image_size) == ("array", 40, (8, 8))
    with np.load(tmp_path / "statistics.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(file["mu"], found.features.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(found.features.double(), rowvar=False), rtol=1e-9, atol=1e-12)
        assert file["mu_s"].shape == (7,) and file["sigma_s"].shape == (7, 7)


def test_reference_statistics_are_computed_once_for_the_same_content(tmp_path):
    folder, extractor = save_folder(tmp_path / "own", random_images()), Thumbnails()
    first = reference_statistics(folder, extractor, progress=False)
    again = reference_statistics(save_folder(tmp_path / "copy", random_images()), extractor, progress=False)
    assert extractor.seen == 12 and torch.equal(first.features, again.features)
    assert (first.name, again.name) == ("own", "copy")
    changed = random_images()
    changed[3, 0, 0, 0] += 1
    reference_statistics(save_folder(tmp_path / "own", changed), extractor, progress=False)
    assert extractor.seen == 24
    reference_statistics(folder, extractor, progress=False, image_size=4)
    assert extractor.seen == 36


def test_moments_of_adms_batch_come_from_the_file_and_neighbours_from_its_images(tmp_path):
    everything, some = random_images(60), random_images(60)[:20]
    whole = compute_statistics(open_images(everything), Thumbnails(), progress=False)
    moments = {"mu": whole.pool.mean, "sigma": whole.pool.covariance}
    moments |= {"mu_s": whole.spatial.mean, "sigma_s": whole.spatial.covariance}
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=some, **moments)
    reference = reference_statistics(tmp_path / "VIRTUAL.npz", Thumbnails(), progress=False)
    assert reference.count == 20 and len(reference.features) == 20
    assert frechet_distance(reference.pool, whole.pool) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(reference.spatial, whole.spatial) == pytest.approx(0, abs=1e-12)
    np.savez(tmp_path / "moments.npz", **moments)
    reference = reference_statistics(tmp_path / "moments.npz", Thumbnails(), progress=False)
    assert set(evaluate_generation(reference, whole)) == {"fid", "sfid", "inception_score"}
    np.savez(tmp_path / "nothing.npz", sigma=np.eye(3))
    with pytest.raises(OSError, match="has no arr_0, but sigma"):
        reference_statistics(tmp_path / "nothing.npz", Thumbnails(), progress=False)


def test_meaningless_comparisons_are_refused():
    small, large = (
        compute_statistics(open_images(random_images(9, side)), Thumbnails(), progress=False) for side in (8, 4)
    )
    with pytest.raises(ValueError, match="has images of 8 x 8 pixels, the samples 'array' of 4 x 4"):
        evaluate_generation(small, large)
    with pytest.raises(ValueError, match="'array' has 1 image"):
        compute_statistics(open_images(random_images(1)), Thumbnails(), progress=False)


def test_real_images_are_nearer_than_noise():
    random = np.random.default_rng(0)
    ramps = (np.linspace(0, 200, 8)[None, :, None, None] + random.uniform(0, 55, (60, 1, 1, 3))).repeat(8, 2)
    one, other = (
        compute_statistics(open_images(values), Thumbnails(), progress=False)
        for values in (ramps[:30].astype(np.uint8), ramps[30:].astype(np.uint8))
    )
    noise = compute_statistics(open_images(random_images(30)), Thumbnails(), progress=False)
    near, far = evaluate_generation(one, other), evaluate_generation(one, noise)
    assert near["fid"] < far["fid"] and near["kid"] < far["kid"] and near["recall"] > far["recall"]
