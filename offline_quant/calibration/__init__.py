"""Calibration text and the second moments measured on it."""
