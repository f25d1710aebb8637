"""Quality of small caches, measured through the real cache: what ``squat-fx eval`` does.

``texts`` cuts windows, ``settings`` says which caches there are, ``measure`` runs windows through
them, ``attention`` compares attention layer by layer, ``tasks`` has retrieval, answers and free
generation, and ``report`` shows what was found.
"""
