"""Scripts that train the small weights of the embedded sample."""
