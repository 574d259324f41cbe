"""Time and memory of the loss; `python -m benchmarks` is the short version."""
