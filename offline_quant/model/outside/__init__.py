"""Models outside the table of families: what a row would say of them is derived, and verified."""
