"""Held-out accuracy: grading of answers against gold answers."""
