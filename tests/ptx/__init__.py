"""Compiled kernels run without a GPU: an interpreter of PTX, and the tests that use it.

    parse       text to instructions
    numbers     registers as numbers of PTX's types
    arithmetic  what each lane does for itself
    warp        what the lanes of a warp do together: shuffles, matrices
    memory      global memory: the storages of tensors; shared memory: who wrote what, and when
    machine     threads, control flow, barriers: `run`
    launches    Triton's launches, compiled and run

All threads of many thread blocks go in lock-step, so an instruction is a few operations of NumPy.
What the hardware would order in another way must not matter: shared memory that is read or
written without a barrier in between is a fault, whatever the values.
"""
