"""`python -m windlass`: the same command line as the `windlass` script."""

from windlass.launch.cli import main

if __name__ == "__main__":
    main()
