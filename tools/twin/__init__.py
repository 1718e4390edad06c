"""The AscendC kernels of ops/ on the twin of the device API, as processes of this machine: docs/kernels.md.

Needs what the kernels are compiled with: cmake, ninja, and the headers of a torch-npu wheel. A RuntimeError names what
is missing.
"""
