"""Loops that train whole models: the text, the batches, the step, and the demo."""
