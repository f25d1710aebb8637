"""How operations run.

``ops`` has schemas, fakes and dispatch, ``reference`` is the specification in torch, and the Triton
files are one operation each.
"""
