"""Audit of a dataset: near-duplicates, doubtful labels and photos of poor quality."""
