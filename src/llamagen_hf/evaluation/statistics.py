"""Statistics of a set of images, cached by content, and the metrics that compare two sets."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from tqdm.auto import tqdm

from .images import Images, open_images
from .inception import FeatureExtractor
from .manifold import precision_recall
from .metrics import FeatureStatistics, frechet_distance, inception_score, kernel_distance
from .npz import array_names, read_arrays, write_arrays


# Names in ADM's reference batches, and ours beside them.
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
OURS = ("features", "logits", "count", "image_size", "name")
READING = 2  # part of the names in the cache; raise it whenever the way images are read changes


@dataclass
class ImageStatistics:
    """What metrics need to know about a set of images.

    Args:
        name (`str`): What reports call the set.
        count (`int`): Number of images; 0 if unknown.
        image_size (`tuple[int, int]`, *optional*): Height and width of the images.
        pool ([`FeatureStatistics`]): Statistics of their features.
        spatial ([`FeatureStatistics`], *optional*): Statistics of their spatial features.
        features (`torch.Tensor` of shape `(count, d)`, *optional*): The features themselves.
        logits (`torch.Tensor` of shape `(count, classes)`, *optional*): The classifier's logits.
    """

    name: str
    count: int
    image_size: tuple[int, int] | None
    pool: FeatureStatistics
    spatial: FeatureStatistics | None = None
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def save(self, path: str | Path) -> None:
        """Write everything as `.npz`. ADM's evaluator can compute FID and sFID from such a file.

        It reads `mu`, `sigma`, `mu_s` and `sigma_s`. For precision and recall it needs the images, which
        [`~llamagen_hf.evaluation.npz.write_images`] writes.
        """
        arrays = {"mu": self.pool.mean, "sigma": self.pool.covariance}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        arrays |= {name: getattr(self, name) for name in OURS}
        write_arrays(path, **{name: np.asarray(value) for name, value in arrays.items() if value is not None})

    @classmethod
    def load(cls, path: str | Path) -> "ImageStatistics":
        """Read what [`save`] wrote, or the moments of one of ADM's reference batches.

        Raises:
            OSError: If the file is damaged, or does not hold such statistics.
        """
        arrays = read_arrays(path, (*MOMENTS, *OURS))
        if not {"mu", "sigma"} <= set(arrays):
            raise OSError(f"{Path(path).name!r} does not hold statistics: it has no mu and sigma.")
        count, size = int(arrays.get("count", 0)), arrays.get("image_size")
        pool, spatial = (
            FeatureStatistics.from_moments(arrays[mean], arrays[covariance], max(count, 2)) if mean in arrays else None
            for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
        )
        features, logits = (
            torch.from_numpy(arrays[name]) if name in arrays else None for name in ("features", "logits")
        )
        size = None if size is None else tuple(size.tolist())
        return cls(str(arrays.get("name", Path(path).name)), count, size, pool, spatial, features, logits)


def compute_statistics(
    images: Images, extractor: FeatureExtractor, batch_size: int = 64, progress: bool = True
) -> ImageStatistics:
    """Compute the statistics of images.

    Args:
        images ([`~llamagen_hf.evaluation.images.Images`]): The images.
        extractor ([`~llamagen_hf.evaluation.inception.FeatureExtractor`]): Turns them into features.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Raises:
        ValueError: If fewer than two images can be used, or one can't be read and bad images are not skipped.
    """
    pool, spatial, features, logits, size = FeatureStatistics(), FeatureStatistics(), [], [], None
    with tqdm(total=len(images), desc=images.name, unit="image", disable=not progress) as bar:
        for batch in images.batches(batch_size):
            size = batch.shape[1:3]
            found = extractor(batch)
            pool.update(found.pool)
            features.append(found.pool)
            if found.spatial is not None:
                spatial.update(found.spatial)
            if found.logits is not None:
                logits.append(found.logits)
            bar.update(len(batch))
    if pool.count < 2:
        raise ValueError(f"{images.name!r} has {pool.count} image(s) that can be used; at least 2 are needed.")
    return ImageStatistics(
        name=images.name,
        count=pool.count,
        image_size=size,
        pool=pool,
        spatial=spatial if spatial.count else None,
        features=torch.cat(features),
        logits=torch.cat(logits) if logits else None,
    )


def reference_statistics(
    source, extractor: FeatureExtractor, batch_size: int = 64, progress: bool = True, **kwargs
) -> ImageStatistics:
    """Statistics of reference images, computed once per content and extractor and then cached.

    Args:
        source: What [`~llamagen_hf.evaluation.images.open_images`] takes, with `kwargs` as its options; or an `.npz`
            that holds statistics. From one of ADM's reference batches come the moments, which are those of its whole
            data set, and the images for precision, recall and KID, just as in ADM's evaluator.
        extractor, batch_size, progress: As for [`compute_statistics`].

    Returns:
        [`ImageStatistics`]: Cached in the assets folder of huggingface_hub.

    Raises:
        OSError: If a file is missing or damaged.
        ValueError: If there are no usable images.
    """
    given = None
    if isinstance(source, (str, Path)) and Path(source).suffix == ".npz":
        held = array_names(source)
        if "mu" in held:
            given = ImageStatistics.load(source)
            if "features" in held or "arr_0" not in held:
                return given
    images = open_images(source, **kwargs)
    folder = cached_assets_path("llamagen-hf", namespace="evaluation", subfolder="statistics")
    path = folder / f"{READING}-{images.fingerprint()[:32]}-{extractor.fingerprint[-32:]}.npz"
    if path.is_file():
        statistics = ImageStatistics.load(path)
        statistics.name = images.name
    else:
        statistics = compute_statistics(images, extractor, batch_size, progress)
        if not images.skipped:
            statistics.save(path)
    if given is not None:
        statistics.pool, statistics.spatial = given.pool, given.spatial or statistics.spatial
    return statistics


def evaluate_generation(reference: ImageStatistics, samples: ImageStatistics, k: int = 3) -> dict[str, float]:
    """Compare images with a reference, by every metric of generation.

    Args:
        reference ([`~llamagen_hf.evaluation.statistics.ImageStatistics`]): Statistics of the reference images.
        samples ([`~llamagen_hf.evaluation.statistics.ImageStatistics`]): Statistics of the images to judge.
        k (`int`, *optional*, defaults to 3): The neighbour for precision and recall.

    Returns:
        `dict[str, float]`: `fid`; `sfid`, `inception_score`, `precision`, `recall`, `kid` and `kid_std`, each where
        both sides have the features it needs.

    Raises:
        ValueError: If the images differ in size, or there are too few.
    """
    sizes = reference.image_size, samples.image_size
    if None not in sizes and sizes[0] != sizes[1]:
        (height, width), (other_height, other_width) = sizes
        raise ValueError(
            f"The reference {reference.name!r} has images of {width} x {height} pixels, the samples "
            f"{samples.name!r} of {other_width} x {other_height}; bring both to one size."
        )
    metrics = {"fid": frechet_distance(reference.pool, samples.pool)}
    if reference.spatial is not None and samples.spatial is not None:
        metrics["sfid"] = frechet_distance(reference.spatial, samples.spatial)
    if samples.logits is not None:
        metrics["inception_score"] = inception_score(samples.logits)
    if reference.features is not None and samples.features is not None:
        metrics["precision"], metrics["recall"] = precision_recall(reference.features, samples.features, k)
        metrics["kid"], metrics["kid_std"] = kernel_distance(reference.features, samples.features)
    return metrics
