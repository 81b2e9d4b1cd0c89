"""Training: callbacks for any Trainer."""

from .centroids import CentroidUpdate, move_centroids
from .thresholds import ThresholdUpdate, move_thresholds

__all__ = ["CentroidUpdate", "ThresholdUpdate", "move_centroids", "move_thresholds"]
