"""From a folder of pictures to batches: ingest, sources, order, decoding, views, loader.

In order: `loader` makes batches of `views`, which are cut by `transforms`, changed by `colours` and
hidden by `masks`;
`decoded` pictures come from `sources` (`parquet`, folders) in an `order`; `ingest` writes Parquet.
All randomness is counted (`rng`).
"""
