"""Codes and scales for given bit-widths, and how later matrices make up for rounding errors."""
