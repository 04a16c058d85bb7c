"""What a run takes of the machine, the choice of tier and micro-batch by it, and the refusal where nothing fits."""
