"""A store for other processes of this machine: the control plane only, as bytes go through shared memory. No torch."""
