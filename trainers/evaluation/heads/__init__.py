"""Heads on feature maps: their views of a picture, training loop and files."""
