"""Parts that all HTML reports share."""
