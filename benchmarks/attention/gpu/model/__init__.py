"""A model of what a decode kernel's page loop takes on a multiprocessor. It measures nothing.

It plays the loop's machine instructions, with the stalls and barriers that the compiler wrote
into them, on as many warps as fit a multiprocessor. Queues, intervals and latencies are published
or plausible numbers (`gpus`). Take its ratios between variants of a kernel for more than its
absolute numbers, which may be a quarter off.
"""
