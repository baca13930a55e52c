"""ResNet50, its input and its weights."""
