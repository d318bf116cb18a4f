"""The kernels: one folder per verb; in it one file per backend, and the reference that says what the verb means."""
