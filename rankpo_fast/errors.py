"""The one exception for what a user can put right: bad data, bad options, a bad path."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, where and what would work."""
