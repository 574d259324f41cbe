"""Measurements behind the pages' figures: `python -m benchmarks` times the loss."""

import os

# Read when torch is imported: keeps the profiler from writing start and stop notes over the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
