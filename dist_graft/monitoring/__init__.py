"""Callbacks that watch a run: log, metrics file, TensorBoard, console. They never communicate."""
