"""`python -m offline_quant.cli`."""

from offline_quant.cli import main

if __name__ == "__main__":
    main()
