"""Imports torch and the core while it is looked for."""

from __future__ import annotations

import torch

from hotplug.core.ops.norm import rms_norm
from wrong_platforms.right import Right


class ImportsTheCore(Right):
    kernel = staticmethod(rms_norm)
    zero = torch.zeros(1)
