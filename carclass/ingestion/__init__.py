"""Photos and labels from a source to a dataset."""
