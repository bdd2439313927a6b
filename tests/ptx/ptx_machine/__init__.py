"""A machine that executes compiled PTX with numpy: what Triton made of a kernel, without a GPU.

- parser: PTX text to instructions
- faults: what the machine reports
- registers: the register file of some programs, and operands in it
- ordering: which writes of a program others may rely on
- memory: global and shared memory, copies that arrive late
- scalar: arithmetic, logic and conversions
- moves: loads, stores, copies, exchanges between the threads of a warp
- fragments: matrices in the registers of warps, and their products
- matrix: matrix instructions, and operands in shared memory
- control: blocks of instructions, branches, barriers, the order of programs
- launch: kernels as the project launches them, compiled and executed
"""
