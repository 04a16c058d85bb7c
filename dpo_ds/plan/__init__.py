"""The memory plan: what a run needs, which tier and micro-batch fit, and what to say if nothing does."""
