"""Textual inversion: words whose embeddings come from files (Gal et al. 2022, arXiv:2208.01618)."""
