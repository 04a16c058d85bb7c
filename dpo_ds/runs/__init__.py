"""One run: everything before a model is loaded, its folder and identity, its checkpoints."""
