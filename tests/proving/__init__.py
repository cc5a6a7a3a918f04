"""The proving ground: what can be proven about GPU kernels on a machine without a GPU.

interpreter  mends Triton's interpreter, so that a kernel computes there what it computes on the hardware
traffic      the bytes each launch loads and stores, and how often it touches each element
sanitizer    out-of-bounds lanes, races between programs, padding that leaks, int32 overflow in Triton kernels
cubin        registers, spills, shared memory and access widths of Triton and CUDA kernels, per architecture
cudahost     the CUDA kernels on the CPU, under pytest: barriers, shuffles, races, memory errors
catalog      the kernels and the calls that stand for them; `python -m tests.proving` prints the table

None of it says anything about speed, about the GPU's memory model between blocks, or about the compiler's
floating-point contraction: for these a GPU is needed (`python -m benchmarks.gpu_check`).
"""
