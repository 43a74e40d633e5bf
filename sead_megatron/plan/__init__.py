"""Memory and time of a run before it starts: what every rank holds, and how long a step takes. Torch-free."""
