"""Preference data: loading and checking, tokens, steps. Knows nothing of models in memory, torch or DeepSpeed."""
