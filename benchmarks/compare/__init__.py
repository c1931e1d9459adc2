"""Side by side with every peer: `python -m benchmarks.compare`. `__main__` says what is measured and how."""
