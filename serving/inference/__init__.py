"""Pictures in, features out: placement, preprocessing, batching, the encoder, its outputs."""
