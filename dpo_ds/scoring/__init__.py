"""Packed pairs in, log-probabilities out: the packed batch, its attention, the fused head, scoring a whole set."""
