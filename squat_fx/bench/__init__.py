"""``squat-fx bench``: kernels and whole models beside the fastest full-precision attention.

Imported by the command line only; it needs the extra ``squat_fx[bench]``.
"""
