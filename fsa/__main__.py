"""`python -m fsa` is the command `fsa`."""

from fsa.cli import main

main()
