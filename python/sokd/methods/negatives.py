"""CRD's negatives: for each sample of a batch, K indices of other samples of the training set.

The indices are uniform and independent, with replacement, and a function of two int64 buffers, as
the draws of `sokd.Policy` are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sokd.methods.checks import number
from sokd.ops import draw
from sokd.ops.distributed import place

__all__ = ["Negatives"]

# A uniform has 23 bits. Up to this many samples no index is 1 % likelier than another; for more
# samples an index is made of two uniforms.
_ONE_DRAW_UP_TO = 2**16


class Negatives(nn.Module):
    """index [B] -> [B, K] int64: other samples, with `labels` samples of other classes.

    In the order of their labels, the samples of a class are contiguous and can be skipped:
        r uniform in 0 .. N - size(class) - 1
        place = order[r + (r >= start(class)) * size(class)]
    Without labels each sample is its own class.
    """

    seed: Tensor
    counter: Tensor

    def __init__(self, num_samples: int, count: int, labels: Tensor | None, seed: Tensor) -> None:
        super().__init__()
        number("crd", "num_samples", num_samples, least=2, whole=True)
        number("crd", "negatives", count, least=1, whole=True)
        self.num_samples, self.count, self.labelled = num_samples, count, labels is not None
        self.register_buffer("seed", seed.clone())
        self.register_buffer("counter", torch.zeros(1, dtype=torch.int64))
        if labels is not None:
            self._sort(labels)

    def _sort(self, labels: Tensor) -> None:
        """The samples in the order of their labels; for each, the start and size of its class."""
        labels = torch.as_tensor(labels)
        if labels.shape != (self.num_samples,) or labels.dtype != torch.int64:
            got = f"{list(labels.shape)} {labels.dtype}"
            raise ValueError(
                f"crd: labels must be int64 [{self.num_samples}] (num_samples), got {got}"
            )
        _, own, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise ValueError("crd: labels must be of at least 2 classes, got 1")
        # not persistent: made from the options
        self.register_buffer("_order", own.argsort(stable=True), persistent=False)
        self.register_buffer("_start", (sizes.cumsum(0) - sizes)[own], persistent=False)
        self.register_buffer("_size", sizes[own], persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        column = index.unsqueeze(1)
        if not self.labelled:
            place = self._integers(index.shape[0], self.num_samples - 1)
            return place + (place >= column)
        start, size = (self.get_buffer(name)[column] for name in ("_start", "_size"))
        place = self._integers(index.shape[0], self.num_samples - size)
        return self.get_buffer("_order")[place + (place >= start) * size]

    def _integers(self, batch: int, bound: int | Tensor) -> Tensor:
        """[B, K] uniform in 0 .. bound - 1, bound [B, 1] or an int; in train mode a new draw."""
        draws = 1 if self.num_samples <= _ONE_DRAW_UP_TO else 2
        rank, ranks = place()  # the ranks draw differently and share the counter
        uniforms, _ = draw(self.seed, self.counter + rank, draws * batch * self.count)
        if self.training:
            self.counter.add_(ranks)
        # float64, because u * bound may round up to bound in float32
        exact = uniforms.view(draws, batch, self.count).double()
        unit = exact[0] if draws == 1 else exact[0] + (exact[1] - 0.5) * 2.0**-23
        return (unit * bound).long()
