"""Where training stands."""

from __future__ import annotations

from dataclasses import dataclass

from megablip.config import Duration


@dataclass
class Progress:
    """Counts of the global batches so far, the same on all ranks; a checkpoint holds them."""

    step: int = 0
    tokens: int = 0
    documents: int = 0
    samples: int = 0  # trained, skipped or dropped
    samples_per_epoch: int = 0  # of the sources that are counted

    @property
    def epochs(self) -> float:
        return self.samples / max(self.samples_per_epoch, 1)

    def share_of(self, duration: Duration) -> float:
        """Share of a duration that is done (may pass 1)."""
        return duration.done(steps=self.step, tokens=self.tokens, epochs=self.epochs)
