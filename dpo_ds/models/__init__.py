"""Models, known from their config alone: finding them, their files, their adapters, their FLOPs."""
