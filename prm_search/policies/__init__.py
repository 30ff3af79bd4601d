"""Policies: what samples steps."""
