"""Settings of every job: schema, YAML files and command line."""
