"""Probes: small measurements inside a process of a measured tree. They import hotplug, the tool itself does not."""
