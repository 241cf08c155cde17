"""The command line: one thin file a verb, heavy imports inside the commands."""
