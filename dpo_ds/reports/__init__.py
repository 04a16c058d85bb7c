"""What a run reports: progress, metrics, the held-out pairs' log-probabilities, answers."""
