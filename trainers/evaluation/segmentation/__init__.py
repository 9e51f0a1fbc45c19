"""A class for each pixel, by a head on the encoder's feature maps."""
