"""What all rooms stand on: arrays and rows, checks, the kernels of a system, the gate."""
