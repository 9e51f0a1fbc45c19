"""Objects found from an encoder's feature maps."""
