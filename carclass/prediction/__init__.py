"""Predictions for new photos."""
