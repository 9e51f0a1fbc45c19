"""Probes on pooled features: kNN, linear, RankMe; and the score of a fine-tuned classifier."""
