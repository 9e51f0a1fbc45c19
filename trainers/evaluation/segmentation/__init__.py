"""The segmentation task: a head on feature maps, sliding windows, metrics and pictures."""
