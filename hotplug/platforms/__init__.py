"""In-tree platforms. Each is a plugin like any vendor's: found by entry point, importing hotplug.vendor only."""
