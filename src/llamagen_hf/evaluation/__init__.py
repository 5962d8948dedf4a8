"""Evaluation: the numbers of the papers' evaluator for any pipeline and any tokenizer.

The metrics here are functions of arrays of features and need no more than torch.
"""

from .frechet import FeatureStatistics, frechet_distance
from .inception_score import inception_score
from .kernel import kernel_distance
from .manifold import precision_recall


__all__ = ["FeatureStatistics", "frechet_distance", "inception_score", "kernel_distance", "precision_recall"]
