"""Reference models as plain float modules; they know nothing of 8 bits."""
