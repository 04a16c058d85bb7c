"""Where the reference's log-probabilities come from."""
