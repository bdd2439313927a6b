"""Routed experts on a CPU: time of a layer, and tokens per second of a server, by our kernels and by others.

`layer` times one layer by rivals in this process (`rivals`), and llama.cpp's types in a process of its environment
(`llama`, `ggml_layer`), all in turns (`rounds`). `report` writes what came out.
"""
