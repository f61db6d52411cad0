"""The barrier of a program's threads in Gluon, under the name that the installed Triton has for it."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""`barrier` since Triton 3.7."""
