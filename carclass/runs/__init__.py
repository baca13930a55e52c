"""Runs on storage: metrics, saved models, exports."""
