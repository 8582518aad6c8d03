"""Processes of a run: launching, process group, peers, timeouts and devices."""
