"""`python -m sfv_world` is `sfv-world`; `torchrun -m sfv_world train` trains on many processes."""

from sfv_world.cli import main

if __name__ == "__main__":
    main()
