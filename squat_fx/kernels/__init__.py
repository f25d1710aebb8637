"""How operations run.

``ops`` has schemas, fakes and dispatch, ``reference`` is the specification in torch, ``launch`` and
``fit`` start the kernels, and the Triton files are one operation each.
"""
