"""The engine: its loop, the process around it, what it says to front ends, the processes of other ranks."""
