"""What `python -m pallas_kernels.gpu_report` is made of.

result     one finding: a row of the table
numerics   the suite on the device, against float64
times      kernels against the portable form and what the device can do at best
lines      what users know: jax's own attention, flash-linear-attention's shapes by our kernels
peers      flash-linear-attention itself, by PyTorch, in a process without jax
work       what a process of the command does
page       the findings as a table, a page and plots
"""
