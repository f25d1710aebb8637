"""How operations run: ``ops`` (schemas, fakes, dispatch), ``reference`` (the specification, in torch), Triton files."""
