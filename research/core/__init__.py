"""What every method shares: state, step, loop, checkpoints, metrics, plots."""
