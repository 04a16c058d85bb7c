"""Preference data: loading and checking, tokens, steps. It imports neither torch nor DeepSpeed."""
