"""What a run tells of itself: progress, metrics, held-out pairs and answers."""
