"""The sampling options of `chat` and `run`, and the parameters they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hotplug.core.request import SamplingParams

_PANEL = "Sampling options"

Temperature = Annotated[
    float, typer.Option(min=0.0, max=100.0, help="0 always takes the most likely token", rich_help_panel=_PANEL)
]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens up to this mass", rich_help_panel=_PANEL)
]
TopK = Annotated[int, typer.Option(min=0, help="Keep this many tokens; 0 keeps all", rich_help_panel=_PANEL)]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, show_default=False, help="Longest answer; default: to the end of the context",
                 rich_help_panel=_PANEL),
]  # fmt: skip


def sampling_params(temperature: float, top_p: float, top_k: int, max_tokens: int | None) -> SamplingParams:
    """Raises RequestError."""
    from hotplug.core.request import SamplingParams

    return SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens)
