"""Where training stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from megablip.config import Duration


@dataclass
class Progress:
    """Counts of the global batches so far, the same on all ranks; a checkpoint holds them."""

    step: int = 0
    tokens: int = 0
    documents: int = 0
    samples: int = 0  # trained, skipped or dropped
    samples_per_epoch: int = 0  # of the sources that are counted
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    images_by_source: dict[str, int] = field(default_factory=dict)

    @property
    def epochs(self) -> float:
        return self.samples / max(self.samples_per_epoch, 1)

    def add_by_source(self, tokens: dict[str, int], images: dict[str, int]) -> None:
        """Count a step's tokens and images, given by the sources' names."""
        for counts, more in ((self.tokens_by_source, tokens), (self.images_by_source, images)):
            for name, count in more.items():
                counts[name] = counts.get(name, 0) + count

    def share_of(self, duration: Duration) -> float:
        """Share of a duration that is done (may pass 1)."""
        return duration.done(steps=self.step, tokens=self.tokens, epochs=self.epochs)
