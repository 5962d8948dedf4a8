"""Statistics of a set of images: computed once, kept by content, exchanged as `.npz`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from tqdm.auto import tqdm

from .frechet import FeatureStatistics
from .images import Images, open_images
from .inception import FeatureExtractor
from .npz import read_arrays, write_arrays


# Names in ADM's reference batches, and ours beside them.
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")
READING = 2  # part of the cache's names; to be raised whenever images are read otherwise
OURS = ("features", "logits", "count", "image_size", "name")


@dataclass
class ImageStatistics:
    """What metrics need to know of a set of images.

    Args:
        name (`str`): What they are called in reports.
        count (`int`): How many images the features are of.
        image_size (`tuple[int, int]`, *optional*): Their height and width.
        pool ([`FeatureStatistics`]): Of their features.
        spatial ([`FeatureStatistics`], *optional*): Of their spatial features.
        features (`torch.Tensor` of shape `(count, d)`, *optional*): The features themselves.
        logits (`torch.Tensor` of shape `(count, classes)`, *optional*): The classifier's.
    """

    name: str
    count: int
    image_size: tuple[int, int] | None
    pool: FeatureStatistics
    spatial: FeatureStatistics | None = None
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def save(self, path: str | Path) -> None:
        """Write everything as `.npz`; ADM's evaluator takes its FID and sFID from such a file too.

        It finds them under `mu`, `sigma`, `mu_s` and `sigma_s`. For precision and recall it needs the images, which
        [`~llamagen_hf.evaluation.npz.write_images`] writes.
        """
        arrays = {"mu": self.pool.mean, "sigma": self.pool.covariance}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        if self.features is not None:
            arrays["features"] = self.features
        if self.logits is not None:
            arrays["logits"] = self.logits
        if self.image_size is not None:
            arrays["image_size"] = np.array(self.image_size)
        write_arrays(
            path, count=np.array(self.count), name=np.array(self.name), **{k: np.asarray(v) for k, v in arrays.items()}
        )

    @classmethod
    def load(cls, path: str | Path) -> "ImageStatistics":
        """Read what [`save`] wrote, or the moments of one of ADM's reference batches.

        Raises:
            OSError: In one sentence, if the file is damaged, or holds no such statistics.
        """
        arrays = read_arrays(path, (*MOMENTS, *OURS))
        if not {"mu", "sigma"} <= set(arrays):
            raise OSError(f"{Path(path).name!r} holds no statistics: it has no mu and sigma.")
        count = int(arrays.get("count", 0))
        features, logits = (
            torch.from_numpy(arrays[name]) if name in arrays else None for name in ("features", "logits")
        )
        spatial = None
        if "mu_s" in arrays:
            spatial = FeatureStatistics.from_moments(arrays["mu_s"], arrays["sigma_s"], max(count, 2))
        size = arrays.get("image_size")
        return cls(
            name=str(arrays.get("name", Path(path).name)),
            count=count,
            image_size=None if size is None else tuple(size.tolist()),
            pool=FeatureStatistics.from_moments(arrays["mu"], arrays["sigma"], max(count, 2)),
            spatial=spatial,
            features=features,
            logits=logits,
        )


def compute_statistics(
    images: Images, extractor: FeatureExtractor, batch_size: int = 64, progress: bool = True
) -> ImageStatistics:
    """Statistics of images.

    Args:
        images ([`~llamagen_hf.evaluation.images.Images`]): The images.
        extractor ([`~llamagen_hf.evaluation.inception.FeatureExtractor`]): Gives their features.
        batch_size (`int`, *optional*, defaults to 64): Images at a time.
        progress (`bool`, *optional*, defaults to `True`): Show a bar with the time left.

    Raises:
        ValueError: In one sentence, if there are fewer than two images that can be used, or one can't be.
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
    """Statistics of reference images, computed once for the same images and the same extractor.

    Args:
        source: What [`~llamagen_hf.evaluation.images.open_images`] takes, `kwargs` being its options; or an `.npz`
            that holds statistics. Of one of ADM's reference batches the moments are taken, which are those of its
            whole data set, and its images for precision, recall and KID, just as ADM's evaluator does.
        extractor, batch_size, progress: As for [`compute_statistics`].

    Returns:
        [`ImageStatistics`]: Kept in the assets cache of huggingface_hub.

    Raises:
        OSError or ValueError: In one sentence, if there are no images there, or not such.
    """
    given = None
    if isinstance(source, (str, Path)) and Path(source).suffix == ".npz":
        held = read_arrays(source, ("mu", "features"))
        if "mu" in held:
            given = ImageStatistics.load(source)
        if "features" in held:
            return given
        if given is not None and not _has_images(source):
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


def _has_images(path: str | Path) -> bool:
    with np.load(path, allow_pickle=False) as file:
        return "arr_0" in file.files
