"""Tools for maintainers: benchmarks, and the scripts that train the sample's weights."""
