"""Synthetic car photos with exact masks, for running the whole pipeline offline in minutes."""
