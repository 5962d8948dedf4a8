"""How well images resemble others: every metric of generation in one go."""

from .frechet import frechet_distance
from .inception_score import inception_score
from .kernel import kernel_distance
from .manifold import precision_recall
from .statistics import ImageStatistics


def evaluate_generation(reference: ImageStatistics, samples: ImageStatistics, k: int = 3) -> dict[str, float]:
    """Compare images with a reference.

    Args:
        reference ([`~llamagen_hf.evaluation.statistics.ImageStatistics`]): Of the reference images.
        samples ([`~llamagen_hf.evaluation.statistics.ImageStatistics`]): Of the images to judge.
        k (`int`, *optional*, defaults to 3): For precision and recall.

    Returns:
        `dict[str, float]`: `fid`; `sfid`, `inception_score`, `precision`, `recall`, `kid` and `kid_std`, each where
        both sides have what it takes.

    Raises:
        ValueError: In one sentence, if the images differ in size, or there are too few.
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
