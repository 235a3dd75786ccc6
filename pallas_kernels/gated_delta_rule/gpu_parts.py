"""What the GPU kernels of the gated delta rule add to the numbers of a chunk."""

from pallas_kernels.core import gpu_chunks

BETA = gpu_chunks.NUMBERS
GATES = BETA + 1
