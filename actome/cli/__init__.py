"""The command line: `main` holds the parser and the exit codes, and every other module is one command.

Nothing here may import torch, transformers or pandas at module level: `actome --help` answers at once.
"""
