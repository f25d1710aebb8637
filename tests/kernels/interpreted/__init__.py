"""The laws under Triton's interpreter; ``test_triton.py`` runs each file by itself."""
