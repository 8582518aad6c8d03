"""Checkpoints: files, background writer, save and resume."""
