"""Token steps of fixed shape, replayed as CUDA graphs where nothing speaks against it."""
