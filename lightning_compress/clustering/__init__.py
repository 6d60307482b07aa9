"""Trained weight sharing: codebooks by k-means, whose entries are trained on as one."""

from lightning_compress.clustering.kmeans import Clusters, Init, kmeans
from lightning_compress.clustering.state import ClusteringState, Gradient, Per

__all__ = ["ClusteringState", "Clusters", "Gradient", "Init", "Per", "kmeans"]
