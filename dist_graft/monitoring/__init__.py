"""What a run shows of itself: log, metrics file, TensorBoard, console. Never communicates."""
