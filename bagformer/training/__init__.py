"""Training on pairs of texts and pictures: configuration, data, loop, checkpoints, log."""
