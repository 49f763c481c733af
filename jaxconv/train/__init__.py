"""Training machinery that every recipe shares: workdir, checkpoints, metrics, profiling."""
