"""The sections of `tools/gpu_check.py`: modules with `run(context)`, each run by `worker` in its own process."""
