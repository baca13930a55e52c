"""Trees of experiments: run, follow and compare them."""
