"""Offline: raw logs → interactions → sequences → dataset folder → shards."""
