"""What work costs: FLOPs, bytes, and what devices can at most."""
