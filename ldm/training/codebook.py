"""Codebook usage during training, and the revival of dead codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm.data import generator
from ldm.models import Quantized, VectorQuantizer, codebook_usage

# A micro-batch: its quantized latents, and the epoch and id of each sample.
MicroBatch = tuple[Quantized, Sequence[int], Sequence[str]]


class Codebook:
    """Counts code usage over the batches of all processes and revives dead codes.

    A code that is nearest to no latent has no gradient. After `revive_after` unused steps it is moved to a latent of
    the batch, sampled with probability proportional to its squared distance from its code, as k-means++ samples its
    centers (Arthur and Vassilvitskii 2007). Samples are keyed, so the number of processes or micro-batches does not
    matter. All codes count as unused at first: after one step the codebook lies among the latents.

    Args:
        quantizer: whose codes are trained.
        averaged: that of the EMA; revived codes are copied there.
        optimizer: its moments of a revived code are reset.
        revive_after: steps; None never revives.

    Attributes:
        unused: steps since each code was last used, [K] int64.
        counts: usage of each code since the last log line, [K] int64.
        revived: number of revived codes since then, [] int64.
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
        self._micro_batches: list[MicroBatch] = []  # of this step

    def add(self, quantized: Quantized, epochs: Sequence[int], ids: Sequence[str]) -> None:
        """Add a micro-batch of the present step."""
        detached = Quantized(*(tensor.detach() for tensor in quantized))
        self._micro_batches.append((detached, epochs, ids))

    def discard_step(self) -> None:
        """Drop the micro-batches of a step that is not made."""
        self._micro_batches = []

    @torch.no_grad()
    def end_step(self, accelerator: Accelerator, step: int, stepped: bool) -> None:
        """Count used codes and revive dead ones, the same in all processes. A collective call.

        Args:
            step: 0-based.
            stepped: False for a skipped step, which changes nothing.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        if not stepped:
            return
        indices = torch.cat([quantized.indices.flatten() for quantized, _, _ in micro_batches])
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
            self._revive(dead, _sample_latents(accelerator, micro_batches, len(dead), self._seed, step))

    def _revive(self, dead: Tensor, latents: Tensor) -> None:
        """Move dead codes to latents [n, C]; with fewer latents than dead codes the rest wait."""
        rows = dead[: len(latents)]
        latents = latents.to(self.codes)
        self.codes[rows] = latents
        self._averaged[rows] = latents
        for moment in self._optimizer.state.get(self.codes, {}).values():
            if moment.shape == self.codes.shape:
                moment[rows] = 0
        self.unused[rows] = 0
        self.revived += len(rows)

    def figures(self) -> dict[str, float]:
        """Perplexity, used fraction and number of revived codes since the last log line."""
        if not bool(self.counts.any()):  # every step was skipped
            return {}
        usage = codebook_usage(self.counts)
        return {
            "codebook_perplexity": usage.perplexity,
            "codebook_used": usage.used,
            "codes_revived": int(self.revived),
        }

    def reset_counts(self) -> None:
        """Start a new log interval."""
        self.counts.zero_()
        self.revived.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"unused": self.unused, "counts": self.counts, "revived": self.revived}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert state["unused"].shape == self.unused.shape, "a resumed run has the same codebook"
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def _sample_latents(
    accelerator: Accelerator, micro_batches: Sequence[MicroBatch], max_count: int, seed: int, step: int
) -> Tensor:
    """Up to `max_count` latents of the global batch, sampled without replacement: [n, C], the same in all processes.

    A latent at squared distance d² from its code gets the key E / d², E standard exponential. The smallest keys are a
    sample with probabilities proportional to d² (Efraimidis and Spirakis 2006, up to a monotone map). Rows are ordered
    by E, which no rounding changes.
    """
    rows = torch.cat([_keyed_latents(*micro_batch, seed, step) for micro_batch in micro_batches])
    rows = rows[rows[:, 0].argsort()[:max_count]]
    if accelerator.num_processes > 1:
        # Padded to the same length in all processes; padding has an infinite key.
        padding = torch.full((max_count - len(rows), rows.shape[1]), torch.inf, dtype=rows.dtype)
        gathered = accelerator.gather(torch.cat([rows, padding]).to(accelerator.device))
        assert isinstance(gathered, Tensor)
        rows = gathered.cpu()
        rows = rows[rows[:, 0].argsort()[:max_count]]
    rows = rows[rows[:, 0].isfinite()]  # drops padding and latents that equal their code
    return rows[rows[:, 1].argsort(), 2:]


def _keyed_latents(quantized: Quantized, epochs: Sequence[int], ids: Sequence[str], seed: int, step: int) -> Tensor:
    """A row (E / d², E, latent) for each latent of a micro-batch: [B · h · w, 2 + C] float64 on the CPU."""
    latents, codes = (tensor.cpu().double().movedim(1, -1) for tensor in (quantized.moments, quantized.latents))
    distance = (latents - codes).square().sum(dim=-1)  # [B, h, w]
    exponentials = torch.stack(
        [
            torch.from_numpy(generator(seed, "codes", epoch, name, step).standard_exponential(distance.shape[1:]))
            for epoch, name in zip(epochs, ids, strict=True)
        ]
    )  # [B, h, w]
    return torch.cat([(exponentials / distance)[..., None], exponentials[..., None], latents], dim=-1).flatten(0, 2)
