"""The codebook of a first stage while it is trained: how it is used, and new places for codes that are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.data import generator
from ldm.models import Quantized, VectorQuantizer, codebook_usage

# A micro-batch: what became of it, and the epoch and the id of each sample.
Seen = tuple[Quantized, Sequence[int], Sequence[str]]


class Codebook:
    """Counts which codes are used, over the batches of all processes, and revives those that are not.

    A code that no latent is nearest to has no gradient and would stay where it is for ever. Once it was not used for
    `revive_after` steps it is put where a latent of the present batch is. Such latents are drawn with a probability in
    proportion to the squared distance to their codes, as k-means++ draws its centres (Arthur and Vassilvitskii 2007),
    so that new codes go where they are missing and not where most latents are, on plain background. The draws are
    keyed by sample, so that neither the number of processes nor that of micro-batches changes them.

    All codes count as unused at first: after the first step the codebook lies among the latents.

    Args:
        quantizer: whose codes learn.
        averaged: the same of the moving average, which is told of new places too: it would take long to get there.
        optimizer: whose moments of a revived code, which are those of its old place, are forgotten.
        revive_after: steps; None revives none.

    Attributes:
        unused: steps since each code was last used, [K] int64.
        counts: how often each was used since the last line of the log, [K] int64.
        revived: how many were revived since then, [] int64.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        averaged: VectorQuantizer,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        revive_after: int | None,
    ) -> None:
        self.codes = quantizer.embedding.weight  # [K, C]
        self.unused = torch.full((len(self.codes),), revive_after or 0, device=self.codes.device)
        self.counts = torch.zeros_like(self.unused)
        self.revived = torch.zeros((), dtype=torch.int64)
        self._averaged = averaged.embedding.weight
        self._optimizer = optimizer
        self._seed, self._revive_after = seed, revive_after
        self._seen: list[Seen] = []  # of the micro-batches of this step

    def see(self, quantized: Quantized, epochs: Sequence[int], ids: Sequence[str]) -> None:
        """Remembers a micro-batch until the step is over."""
        cut = Quantized(*(tensor.detach() for tensor in quantized))
        self._seen.append((cut, epochs, ids))

    def forget(self) -> None:
        """Drops the micro-batches of a step that is not made."""
        self._seen = []

    @torch.no_grad()
    def settle(self, accelerator: Accelerator, step: int, moved: bool) -> None:
        """Ends a step: counts what was used, and revives what was not, the same in all processes; all call this.

        Args:
            step: the step that was made, 0-based.
            moved: whether it was made; after one that was skipped all is as before.
        """
        seen, self._seen = self._seen, []
        if not moved:
            return
        indices = torch.cat([quantized.indices.flatten() for quantized, _, _ in seen])
        counts = torch.bincount(indices, minlength=len(self.codes))
        if accelerator.num_processes > 1:
            summed = accelerator.reduce(counts, "sum")
            assert isinstance(summed, Tensor)
            counts = summed
        self.counts += counts
        self.unused = torch.where(counts > 0, 0, self.unused + 1)
        if self._revive_after is None:
            return
        dead = (self.unused >= self._revive_after).nonzero().flatten()
        if len(dead):
            self._revive(dead, _places(accelerator, seen, len(dead), self._seed, step))

    def _revive(self, dead: Tensor, places: Tensor) -> None:
        """Puts codes to places [n, C]; where those are fewer, as there are few latents, the others wait."""
        rows = dead[: len(places)]
        places = places.to(self.codes)
        self.codes[rows] = places
        self._averaged[rows] = places
        for moment in self._optimizer.state.get(self.codes, {}).values():
            if moment.shape == self.codes.shape:
                moment[rows] = 0
        self.unused[rows] = 0
        self.revived += len(rows)

    # ---- what is logged

    def figures(self) -> dict[str, float]:
        """Perplexity and share of the codes used since the last line of the log, and how many were revived."""
        if not bool(self.counts.any()):  # where every step was skipped
            return {}
        usage = codebook_usage(self.counts)
        return {
            "codebook_perplexity": usage.perplexity,
            "codebook_used": usage.used,
            "codes_revived": int(self.revived),
        }

    def start_over(self) -> None:
        """Begins a new line of the log."""
        self.counts.zero_()
        self.revived.zero_()

    # ---- what a checkpoint keeps

    def state(self) -> dict[str, Tensor]:
        return {"unused": self.unused, "counts": self.counts, "revived": self.revived}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        assert state["unused"].shape == self.unused.shape, "a resumed run has the same codebook"
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _places(accelerator: Accelerator, seen: Sequence[Seen], most: int, seed: int, step: int) -> Tensor:
    """Up to `most` latents of the batch of all processes, drawn without repetition: [n, C], the same in all of them.

    A latent at the squared distance d² from its code gets the number E / d², E standard exponential; those with the
    smallest numbers are a draw with probabilities in proportion to d² (Efraimidis and Spirakis 2006, whose keys these
    are up to a monotone map). They come in the order of E, which no rounding changes.
    """
    rows = torch.cat([_candidates(*micro, seed, step) for micro in seen])
    rows = rows[rows[:, 0].argsort()[:most]]
    if accelerator.num_processes > 1:
        # In all processes as many; those that stand in for none are as far as can be.
        absent = torch.full((most - len(rows), rows.shape[1]), torch.inf, dtype=rows.dtype)
        extract = accelerator.gather(torch.cat([rows, absent]).to(accelerator.device))
        assert isinstance(extract, Tensor)
        rows = extract.cpu()
        rows = rows[rows[:, 0].argsort()[:most]]
    rows = rows[rows[:, 0].isfinite()]  # a latent that is its code, or none
    return rows[rows[:, 1].argsort(), 2:]


def _candidates(quantized: Quantized, epochs: Sequence[int], ids: Sequence[str], seed: int, step: int) -> Tensor:
    """A row (E / d², E, latent) for each latent of a micro-batch: [B · h · w, 2 + C] float64 on the CPU."""
    latents, codes = (tensor.cpu().double().movedim(1, -1) for tensor in (quantized.moments, quantized.latents))
    distance = (latents - codes).square().sum(dim=-1)  # [B, h, w]
    draws = [
        torch.from_numpy(generator(seed, "codes", epoch, name, step).standard_exponential(distance.shape[1:]))
        for epoch, name in zip(epochs, ids, strict=True)
    ]
    numbers = torch.stack(draws)  # [B, h, w]
    return torch.cat([(numbers / distance)[..., None], numbers[..., None], latents], dim=-1).flatten(0, 2)
