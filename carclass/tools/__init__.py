"""Tools for maintainers: benchmarks and the training of the sample's weights."""
