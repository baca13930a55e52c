"""Shared parts of the HTML reports: page, axes and SVG."""
