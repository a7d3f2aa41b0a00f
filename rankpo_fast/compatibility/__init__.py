"""Other trainers' flags and commands: what each is to us. Tables first, see `names` and `fates`."""
