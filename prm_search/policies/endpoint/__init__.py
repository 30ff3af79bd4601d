"""OpenAIPolicy: a policy behind an OpenAI-compatible server."""
