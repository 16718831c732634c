"""`python -m trocr_fast` is the command `trocr-fast`."""

from trocr_fast.cli import main

main()
