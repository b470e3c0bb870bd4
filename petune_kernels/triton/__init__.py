"""How an op runs on a GPU without a compiler: Triton kernels and their launchers, one file per op.

Each launcher has the signature of its op in schema.py, allocates by shape and serves float16, bfloat16 and float32.
"""
