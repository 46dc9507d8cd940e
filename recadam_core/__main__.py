"""`python -m recadam_core` is the command `recadam`."""

from .cli import main

if __name__ == "__main__":
    main()
