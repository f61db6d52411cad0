"""Layers: weights plus the planned ops that use them. A layer binds its ops in its constructor."""
