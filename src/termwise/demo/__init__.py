"""`python -m termwise`: small training runs on real data, evaluated on held-out data.

Requires the extra `demo`, and downloads nothing. Nothing in this package is public, and `import
termwise` does not import it.
"""
