"""Shared bases, and the components of every expert in order of importance."""
