"""Process group, peers, timeouts, devices and launching."""
