"""From a folder of pictures to batches: ingest, sources, order, decoding, masks, loader."""
