"""Metrics of features against ADM's evaluator and against formulas written from the definitions."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llamagen_hf.evaluation import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold,
    precision_recall,
)


CASES = json.loads((Path(__file__).parents[1] / "parity" / "metrics.json").read_text())["cases"]

# What TensorFlow 2.21 gives on a CPU for the arithmetic of ADM's evaluator: k-th smallest of the half-precision
# distances (of float32 ones where they overflow), then the shares. (seed, n, m, d, scale, k, precision, recall)
TENSORFLOW = [
    (11, 300, 250, 2048, 0.4, 3, 0.416, 0.4866666666666667),
    (12, 200, 333, 777, 0.4, 3, 0.5315315315315315, 0.485),
    (13, 400, 300, 64, 40.0, 3, 0.7266666666666667, 0.65),  # overflows
    (14, 250, 250, 16, 1.0, 1, 0.548, 0.536),
    (15, 250, 200, 16, 1.0, 10, 0.96, 0.976),
    (17, 30, 4, 33, 1.0, 3, 1.0, 1.0),
]


def features(seed, n, d, shift=0.0, scale=1.0):
    random = np.random.Generator(np.random.PCG64(seed))
    return (np.abs(random.standard_normal((n, d))) * scale + shift).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_distance_precision_and_recall_are_those_of_adms_evaluator(name):
    reference, samples = (features(**CASES[name][side]) for side in ("reference", "samples"))
    assert frechet_distance(reference, samples) == pytest.approx(CASES[name]["fid"], rel=1e-4)
    assert precision_recall(reference, samples) == (CASES[name]["precision"], CASES[name]["recall"])


@pytest.mark.parametrize("seed, n, m, d, scale, k, precision, recall", TENSORFLOW)
def test_neighbourhoods_are_tensorflows(seed, n, m, d, scale, k, precision, recall):
    random = np.random.Generator(np.random.PCG64(seed))
    reference = (np.abs(random.standard_normal((n, d))) * scale).astype(np.float32)
    samples = (np.abs(random.standard_normal((m, d))) * scale + 0.02).astype(np.float32)
    assert precision_recall(reference, samples, k) == (precision, recall)


def test_precision_and_recall_do_not_depend_on_blocks(monkeypatch):
    reference, samples = features(1, 301, 48), features(2, 203, 48, shift=0.05)
    whole = precision_recall(reference, samples)
    assert 0 < whole[0] < 1 and 0 < whole[1] < 1
    for block, rows in ((100, 7), (101, 1), (300, 50), (202, 1000)):  # one row is left over in some
        monkeypatch.setattr(manifold, "BLOCK", block)
        monkeypatch.setattr(manifold, "ROWS", rows)
        assert precision_recall(reference, samples) == whole


def test_precision_and_recall_trade_places():
    reference, samples = features(1, 200, 16), features(2, 150, 16, scale=0.5)
    precision, recall = precision_recall(reference, samples)
    assert precision_recall(samples, reference) == (recall, precision)
    assert precision > recall  # narrow samples lie well, but do not cover
    assert precision_recall(reference, reference) == (1.0, 1.0)
    assert precision_recall(reference, samples + 100) == (0.0, 0.0)


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def frechet_by_definition(reference, samples):
    means = [x.astype(np.float64).mean(0) for x in (reference, samples)]
    one, other = (np.cov(x.astype(np.float64), rowvar=False) for x in (reference, samples))
    return ((means[0] - means[1]) ** 2).sum() + np.trace(one + other - 2 * root(root(one) @ other @ root(one)))


@pytest.mark.parametrize(
    "n, m, d", [(400, 300, 24), (25, 40, 24), (10, 12, 24), (10, 400, 24), (2, 2, 24), (24, 25, 24)]
)
def test_frechet_distance_by_definition_with_many_and_with_few(n, m, d):
    reference, samples = features(3, n, d), features(4, m, d, shift=0.1, scale=1.2)
    assert frechet_distance(reference, samples) == pytest.approx(frechet_by_definition(reference, samples), rel=1e-6)


def test_frechet_distance_of_singular_covariances():
    reference, samples = features(5, 300, 16), features(6, 300, 16)
    reference[:, 3] = 0  # a feature that never fires
    samples[:, 5] = samples[:, 6]  # two that are one
    assert frechet_distance(reference, samples) == pytest.approx(frechet_by_definition(reference, samples), rel=1e-6)
    constant = np.ones((30, 16), np.float32)
    assert frechet_distance(constant, 2 * constant) == pytest.approx(16)
    for same in (reference, constant, features(5, 4, 16)):
        assert frechet_distance(same, same) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_known_gaussians():
    # Diagonal covariances commute: the sum of squared differences of deviations.
    random = np.random.default_rng(0)
    x = random.standard_normal((4000, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)).T)  # exactly white
    assert frechet_distance(x * [1, 2, 3], x * [2, 2, 5] + [1, 0, 0]) == pytest.approx(1 + 1 + 0 + 4)


@pytest.mark.parametrize("batch_size", [1, 7, 100, 1000])
def test_statistics_of_batches_are_those_of_the_whole(batch_size):
    whole = features(7, 500, 12, shift=1000, scale=0.01)  # a large mean must not swallow the deviations
    statistics = FeatureStatistics()
    for start in range(0, len(whole), batch_size):
        statistics.update(whole[start : start + batch_size])
    expected = np.cov(whole.astype(np.float64), rowvar=False)
    assert statistics.count == 500
    np.testing.assert_allclose(statistics.mean, whole.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-8, atol=1e-12)
    others = features(8, 400, 12, shift=1000, scale=0.01)
    assert frechet_distance(statistics, others) == pytest.approx(frechet_distance(whole, others), rel=1e-9)


def score_by_definition(logits, split_size):
    scores = []
    for start in range(0, len(logits), split_size):
        part = np.exp(logits[start : start + split_size].astype(np.float64))
        shares = part / part.sum(1, keepdims=True)
        marginal = shares.mean(0)
        scores.append(math.exp(sum((row * np.log(row / marginal)).sum() for row in shares) / len(shares)))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("split_size", [5000, 100, 64])
def test_inception_score_by_definition(split_size):
    logits = np.random.default_rng(0).standard_normal((250, 10)).astype(np.float32) * 3
    assert inception_score(logits, split_size) == pytest.approx(score_by_definition(logits, split_size), rel=1e-9)


def test_inception_score_at_its_ends():
    assert inception_score(torch.zeros(50, 8)) == pytest.approx(1)
    assert inception_score(1e4 * torch.eye(8).repeat(3, 1)) == pytest.approx(8)  # shares of exactly 0 and 1


def test_kernel_distance_by_definition():
    x, y = features(1, 40, 6).astype(np.float64), features(2, 40, 6, shift=0.3).astype(np.float64)

    def kernel(a, b):
        return (a @ b / 6 + 1) ** 3

    pairs = [(i, j) for i in range(40) for j in range(40)]
    within = sum(kernel(z[i], z[j]) for z in (x, y) for i, j in pairs if i != j) / (40 * 39)
    between = sum(kernel(x[i], y[j]) for i, j in pairs) / 40**2
    mean, deviation = kernel_distance(x, y, num_subsets=2, subset_size=40)
    assert mean == pytest.approx(within - 2 * between) and deviation == pytest.approx(0, abs=1e-9)
    assert kernel_distance(x, y, 5, 20) == kernel_distance(x, y, 5, 20) != kernel_distance(x, y, 5, 20, seed=1)


def test_kernel_distance_is_unbiased():
    x, y = features(1, 2000, 8), features(2, 2000, 8)
    mean, deviation = kernel_distance(x, y, 50, 500)
    assert abs(mean) < deviation < kernel_distance(x, y + 0.2, 50, 500)[0]


NAN = features(1, 20, 8)
NAN[7, 3] = np.nan


@pytest.mark.parametrize("metric", [frechet_distance, precision_recall, kernel_distance])
@pytest.mark.parametrize(
    "reference, samples, message",
    [
        (features(1, 20, 8), NAN, "1 of 20 sample features hold NaN or infinity, the first in row 7"),
        (features(1, 20, 8), features(1, 20, 9), "reference features are 8 wide and the sample features 9"),
        (features(1, 20, 8), features(1, 1, 8), "There are 1 sample features; at least"),
        (features(1, 0, 8), features(1, 20, 8), "There are 0 reference features; at least"),
        (features(1, 20, 8)[0], features(1, 20, 8), r"shape \(8,\); expected real numbers of shape \(n, d\)"),
        (np.array([["a"]]), features(1, 20, 8), "must be an array of numbers"),
    ],
)
def test_wrong_features_are_refused_in_words(metric, reference, samples, message):
    with pytest.raises(ValueError, match=message):
        metric(reference, samples)


def test_wrong_settings_are_refused_in_words():
    x = features(1, 20, 8)
    with pytest.raises(ValueError, match="There are 20 reference features; at least 21 are needed"):
        precision_recall(x, x, k=20)
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="expected an integer of at least 1"):
            precision_recall(x, x, k)
    with pytest.raises(ValueError, match="`split_size` is 0"):
        inception_score(x, 0)
    with pytest.raises(ValueError, match="at least 2"):
        FeatureStatistics.from_moments([0.0], [[1.0]], 1).covariance  # noqa: B018
    with pytest.raises(ValueError, match=r"expected \(d,\) and \(d, d\)"):
        FeatureStatistics.from_moments([0.0], [[1.0, 2.0]], 5)


def test_integers_and_tensors_are_taken_as_they_are():
    x, y = (np.random.default_rng(seed).integers(0, 50, (60, 5)) for seed in (0, 1))
    assert frechet_distance(x, y) == frechet_distance(torch.tensor(x), y.astype(np.float64))
    assert precision_recall(x, y) == precision_recall(torch.tensor(x).float(), torch.tensor(y))


@pytest.mark.slow
def test_precision_and_recall_of_many_stay_in_memory():
    script = (
        "import torch, resource\n"
        "from llamagen_hf.evaluation import precision_recall\n"
        "x, y = (torch.randn(25_000, 64) for _ in range(2))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(*precision_recall(x, y), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    precision, recall, kilobytes = map(float, printed.split())
    assert 0.5 < precision < 1 and 0.5 < recall < 1
    assert kilobytes < 2.5e6  # 25,000 x 25,000 distances alone would take as much
