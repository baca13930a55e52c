"""Scripts that train the weights of the embedded sample."""
