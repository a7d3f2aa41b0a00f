"""The bodies of commands that are more than a call; the command line reads their flags."""
