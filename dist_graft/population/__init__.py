"""Many networks, one a process: the only room that communicates."""
