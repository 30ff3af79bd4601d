"""Scorers: what rewards the nodes of a search tree."""
