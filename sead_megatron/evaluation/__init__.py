"""Grading of answers against gold answers, held-out accuracy during training, and benchmarks of any checkpoint."""
