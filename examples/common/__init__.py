"""What the examples share: the anchored-branch transformer, its training and its optimiser."""
