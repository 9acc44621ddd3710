"""When it happens and what it costs: cycles, bytes and energy of a workload on an accelerator."""
