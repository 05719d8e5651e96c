"""`python -m foveate` is the `foveate` command."""

from .cli import main


if __name__ == "__main__":
    main()
