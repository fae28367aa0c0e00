"""What is Xception's own: network, recipes, learning rates, loss and data."""
