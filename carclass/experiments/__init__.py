"""Trees of experiments: training, status and comparison."""
