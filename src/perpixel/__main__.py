"""`python -m perpixel`, which is also what `torchrun -m perpixel train ...` runs."""

from perpixel.cli import main

if __name__ == "__main__":
    main()
