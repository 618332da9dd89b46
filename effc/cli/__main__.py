"""``python -m effc.cli``."""

from effc.cli import main

if __name__ == "__main__":
    main()
