"""Prompts, difficulties, rollouts and the batches made of them."""
