"""What is computed: data types, formats, quantizers, packing, exact PE arithmetic, models and workloads.

Nothing here knows a clock or a tool. ``sim``, ``rtl``, ``gpu_ref`` and ``flow`` import from here, never the reverse.
"""
