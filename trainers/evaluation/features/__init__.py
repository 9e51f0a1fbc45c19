"""Features of a data set: extracted in parts, pooled, or as maps in a cache."""
