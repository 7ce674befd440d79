"""Carries the recorder and vLLM to a GPU machine without a network."""
