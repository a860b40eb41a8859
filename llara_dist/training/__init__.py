"""Curriculum, engine, loop, checkpoint."""
