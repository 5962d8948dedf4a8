"""Evaluation: the metrics of papers, for any pipeline and any image tokenizer.

The functions here take arrays of features and need nothing but torch.
"""

from .manifold import precision_recall
from .metrics import FeatureStatistics, frechet_distance, inception_score, kernel_distance


__all__ = ["FeatureStatistics", "frechet_distance", "inception_score", "kernel_distance", "precision_recall"]
