"""From a bucket of vehicle photos to a trustworthy fine-grained classifier, on a Ray cluster."""
