"""Checkpoint directories: written, dequantized, pushed to the Hub."""
