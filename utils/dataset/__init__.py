"""Stored activations as training data: selected, shuffled, in batches."""

from utils.dataset.select import ActivationDataset, Selection

__all__ = ["ActivationDataset", "Selection"]
