"""The CPU kernels: C++ sources, how they are compiled (`build.py`), and their functions for Python (`library.py`)."""
