"""Packed pairs in, log-probabilities out: the packed batch, its attention, the fused head, and the scorer of them."""
