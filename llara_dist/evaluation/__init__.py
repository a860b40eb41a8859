"""Decoding, candidate scoring, metrics, report."""
