"""Rows in, splits out; no module here imports torch."""
