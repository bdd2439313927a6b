"""Bit-widths under one budget: tables of choices, objectives, the knapsack solver."""
