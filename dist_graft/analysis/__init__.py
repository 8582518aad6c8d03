"""Commands that read runs and machines: evaluate, inspect, export, status, doctor, plan."""
