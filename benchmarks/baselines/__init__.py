"""Other people's quantizers, run from their own libraries on the routed experts of a model.

    python -m benchmarks.baselines gptq --model DIR --calib FILE --bits 2 --out DIR [--text FILE]

`driver.run_baseline` is the same as a function. It starts the baseline's module (`gptq`, `autoround`, `gguf`, `hqq`,
`rtn`) as a process of its own, in a virtual environment made from `requirements/` the first time (`environments`), and
turns what the library left of each expert into an ordinary checkpoint (`checkpoint`), so that one evaluator serves all
methods. Baseline modules import nothing of this project but `job`, and their library inside functions only.
"""
