"""The command `fsa`, one file a command."""
