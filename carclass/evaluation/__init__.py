"""Evaluation of a run on labelled photos."""
