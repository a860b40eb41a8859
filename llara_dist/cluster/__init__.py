"""Runs on several hosts: jobs of a Slurm cluster, and launches over ssh."""
