"""What a compiling platform is given to compile: one step of static shape, from token ids to vocabulary scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StepInput:
    """An input of a step's program, of `Limits.index_dtype`."""

    name: str
    dims: tuple[str, ...]
    """Its sizes: "tokens", "requests", "requests + 1", "blocks" (columns of a block table), "scores" or "kept"."""


class StepProgram(Protocol):
    """A step as a `torch.export` program, made when it is asked for.

    Its inputs are those of `inputs`, in order, then the caches. With one block table: token_ids [T], positions [T],
    slots.0 [T], block_table.0 [R, blocks], query_start [R + 1], seq_lens [R] and logit_indices [R]; a model with
    several KV groups has slots and a block table for each of their tables.
    Its outputs: hidden states [T, hidden], float32 scores [R, vocab]; then the caches with the step written.
    Weights are the program's parameters and buffers. Nothing in it writes to an input, and every size is fixed.

    Where `Limits.compiled.dynamic` says so T, R, the block table's columns and the number of blocks vary, and there
    is an input more, before the caches: `kept` [K], the tokens whose hidden states are wanted. Then logit_indices [S]
    are among the K, hidden states are [K, hidden] and scores [S, vocab]; K and S may be 0.
    """

    @property
    def inputs(self) -> Sequence[StepInput]:
        """The declared inputs but for the caches, in the order of the program."""

    @property
    def num_tokens(self) -> int:
        """T, or the most that it may be. Equal to `num_requests` where every request has one token: decodes."""

    @property
    def num_requests(self) -> int:
        """R, or the most that it may be."""

    @property
    def caches(self) -> Sequence[torch.Tensor]:
        """The tensors of the engine's KV cache, in the order of the program's inputs."""

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The weights by the names of the program's parameters and buffers, in place on the device.

        Their values must not go into an artifact: the same one serves other weights of the same shapes.
        """

    @property
    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        """By call site: the platform's own kernels that the plan chose for this shape.

        Each is called as its node is, with all parameters of the op: without the site, and with `AttentionInputs` in
        place of its fields.
        """

    def export(self) -> torch.export.ExportedProgram:
        """The program with every operation as an opaque node `hotplug::<op>(..., site)`.

        Takes seconds, so ask only where no artifact is at hand. A node that is called as it is runs the op's
        plain-PyTorch reference.
        """

    def inlined(self) -> torch.export.ExportedProgram:
        """`export()` with the reference in place of every node whose site is not in `kernels`: functional aten."""
