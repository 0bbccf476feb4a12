"""`python -m fsa` is the command `fsa`."""

from fsa.cli.app import main

main()
