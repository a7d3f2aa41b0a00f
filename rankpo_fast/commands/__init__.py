"""The bodies of commands, a file each: its `run` takes the settings that the command line read."""
