"""Triton kernels and their launchers, one file per operator; installed as ``pyxai_bounds.kernels``.

Importing this package must not import triton, which is absent on most CPU machines: each operator's file
does so itself, and ``pyxai_bounds/ops`` imports that file when its backend is asked for.
"""
