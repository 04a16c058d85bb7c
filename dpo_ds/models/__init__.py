"""What a config says about a model: finding it, its files, its adapters, its FLOPs."""
