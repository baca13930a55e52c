"""Ray clusters: connection, resources, metrics and job submission."""
