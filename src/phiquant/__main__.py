"""`python -m phiquant`: the same as the `phiquant` script."""

from .cli import main

if __name__ == "__main__":
    main()
