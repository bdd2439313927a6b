"""Damaged checkpoints, thousands of them, through everything that reads one."""
