"""Starts runs; so far on one machine."""
