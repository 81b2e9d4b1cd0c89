"""Training: callbacks for any Trainer."""

from .centroids import CentroidUpdate, move_centroids

__all__ = ["CentroidUpdate", "move_centroids"]
