"""Evaluation: which strategy answers how many problems, at what price, and how sure that is."""
