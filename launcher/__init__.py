"""Starts runs, on one machine or the nodes of a SLURM job, and sees them through."""
