"""Drawn car photos with exact masks, so that the whole chain runs offline in minutes."""
