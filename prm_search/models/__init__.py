"""Checkpoints: hub ids, folders, adapters and GGUF files, found and loaded."""
