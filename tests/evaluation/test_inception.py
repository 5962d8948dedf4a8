"""Inception as torch-fidelity has it, with random weights, where torchvision can be imported; and without it."""

import importlib

import numpy as np
import pytest
import torch

from llamagen_hf.evaluation.inception import InceptionFeatures


def missing() -> str | None:
    try:
        importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:
        return f"no torch-fidelity with a torchvision that fits torch: {error}"
    return None


REASON = missing()
needs_inception = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.mark.skipif(REASON is None, reason="torch-fidelity is there")
def test_without_torch_fidelity_a_sentence_says_what_is_needed():
    with pytest.raises(ImportError, match="Inception needs torch-fidelity and a torchvision that fits torch"):
        InceptionFeatures()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights in torch-fidelity's layout."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            return None

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Empty("random", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def images(count, side=64):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@needs_inception
def test_features_have_adms_widths_and_do_not_depend_on_batches(weights):
    extractor = InceptionFeatures(weights)
    batch = images(5)
    found = extractor(batch)
    assert (
        found.pool.shape == (5, 2048) and found.spatial.shape == (5, 17 * 17 * 7) and found.logits.shape == (5, 1008)
    )
    one = extractor(batch[3:4])
    for whole, alone in zip(vars(found).values(), vars(one).values(), strict=True):
        torch.testing.assert_close(whole[3:4], alone, rtol=1e-3, atol=1e-3 * whole.abs().max().item())


@needs_inception
def test_spatial_features_are_the_first_branch_of_the_sixth_block(weights):
    extractor = InceptionFeatures(weights)
    kept = {}
    block = extractor.network.Mixed_6d
    handle = block.register_forward_hook(lambda module, inputs, output: kept.update(output=output))
    spatial = extractor(images(2)).spatial.unflatten(1, (17, 17, 7))
    handle.remove()
    # The block begins with its first branch, whose channels come first.
    torch.testing.assert_close(spatial, kept["output"][:, :7].permute(0, 2, 3, 1))
    assert (spatial >= 0).all()  # after the activation, as the name in TensorFlow's graph is


@needs_inception
def test_logits_are_without_bias(weights):
    extractor = InceptionFeatures(weights)
    found = extractor(images(3))
    torch.testing.assert_close(found.logits, found.pool @ extractor.network.fc.weight.T, rtol=1e-4, atol=1e-3)


@needs_inception
def test_the_fingerprint_is_that_of_the_weights(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["fc.weight"][0, 0] += 1
    torch.save(state, tmp_path / "other.pth")
    first = InceptionFeatures(weights).fingerprint
    assert InceptionFeatures(weights).fingerprint == first != InceptionFeatures(tmp_path / "other.pth").fingerprint


class Harmful:
    def __reduce__(self):
        return print, ("code ran",)


@needs_inception
def test_files_that_are_no_weights_are_refused_in_words_and_run_no_code(weights, tmp_path, capsys):
    torch.save({"harm": Harmful()}, tmp_path / "harm.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    for name in ("harm", "foreign", "missing"):
        with pytest.raises(OSError, match=f"{name}.pth' holds"):
            InceptionFeatures(tmp_path / f"{name}.pth")
    assert "code ran" not in capsys.readouterr().out
