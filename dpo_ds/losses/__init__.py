"""Preference losses and metrics: pure functions of log-probabilities."""
