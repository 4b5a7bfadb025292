"""`python -m actome` is the command `actome`."""

from actome.cli.main import entry

if __name__ == "__main__":
    entry()
