"""The pair of causal LMs whose log-ratio is the reward (arXiv 2412.01981)."""
