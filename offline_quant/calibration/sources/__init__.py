"""The sources of calibration text, one a file; `registry` lists them."""
