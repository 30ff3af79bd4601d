"""vLLM: token steering inside its engine, step search over it, and reward-guided beams behind its server."""
