"""Attention over the KV tree: the hook into transformers, and the layouts that it runs."""
