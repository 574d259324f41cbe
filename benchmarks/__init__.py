"""Measurements behind the README's numbers; see `python -m benchmarks.throughput --help`."""

import os

# Read when torch is imported: keeps the profiler from writing start and stop notes over the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
