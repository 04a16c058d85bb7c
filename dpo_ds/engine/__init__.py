"""The only wing that imports DeepSpeed: building and driving engines, their configs, reading their checkpoints.

Every workaround of a fault of DeepSpeed, torch or transformers is listed in workarounds.py.
"""
