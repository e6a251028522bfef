"""What both stages share; the same files, to the byte, lie in `cold_start/descore` and `dual_rl/descore`."""
