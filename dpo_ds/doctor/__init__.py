"""What is wrong with the pairs, or goes wrong in a run: checks, each a figure with the range in which it is healthy."""
