"""Features of a dataset by a frozen encoder: extracted to Parquet, pooled, maps cached."""
