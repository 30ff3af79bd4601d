"""Serving: reward-guided search behind OpenAI's chat and completion routes, whatever engine samples."""
