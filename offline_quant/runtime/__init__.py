"""Processes, memory, devices and progress; knows nothing of models."""
