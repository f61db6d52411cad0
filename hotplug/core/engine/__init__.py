"""Engines: the core loop, the process around it, and the offline and asynchronous front ends."""
