"""Checkpoints, read and written block by block, never whole."""
