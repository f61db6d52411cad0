"""Kernels in C++ for what PyTorch has no fast kernel for on a processor: quantized products and few float32 rows.

`library` finds the compiled library and says why it cannot serve, `linear` calls it, `build` compiles it; `src/` holds
the C++, from `hotplug_cpu.h` on.
"""
