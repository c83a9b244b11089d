"""Benchmarks: megablip side by side with its rivals, against stated goals."""
