"""The backends: ways to compute the routed experts of a layer, and the choice among them (`select.py`)."""
