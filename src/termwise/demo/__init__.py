"""`python -m termwise`: small training runs on real data, measured held out.

Needs the extra `demo` and downloads nothing. It is a command, not an interface: nothing in here is
public, and `import termwise` does not import it.
"""
