"""The runner: the one place where a step plan becomes work on the device."""
