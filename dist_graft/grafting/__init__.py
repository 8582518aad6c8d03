"""Grafting as pure functions of tensors, without communication or files."""
