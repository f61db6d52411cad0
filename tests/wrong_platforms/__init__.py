"""Platforms with one planted fault each, and the right one that they are made from."""
