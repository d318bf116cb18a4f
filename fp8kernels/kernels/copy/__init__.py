"""copy: does nothing, through every backend; the tutorial for a new verb, and the probe that the toolchain works."""
