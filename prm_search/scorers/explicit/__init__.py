"""Explicit reward models: step PRMs as people publish them, outcome reward models."""
