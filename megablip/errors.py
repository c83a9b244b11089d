"""The errors megablip raises on purpose.

Each message says what happened, where (shard, key, rank, step) and what to do,
and the class says who must act.
"""


def printable(text: str) -> str:
    """`text` with all escaped that no terminal should get but line ends: names in a tar may hold anything."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


class MegablipError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what happened, one sentence.
        where: shard, key, rank, step, file or field concerned; may be empty.
        remedy: what the reader can do about it; may be empty.

    Attributes:
        skipped: records.Skip of the samples that were skipped on the way to it, where no batch tells of them.
    """

    skipped: tuple = ()

    def __init__(self, what: str, *, where: str = "", remedy: str = ""):
        super().__init__(what)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  to do: {self.remedy}")
        return printable("\n".join(lines))

    def __reduce__(self):
        # Keyword arguments and attributes survive the trip from a worker process.
        return _rebuild, (type(self), self.what, self.where, self.remedy), self.__dict__


def _rebuild(cls: type, what: str, where: str, remedy: str) -> MegablipError:
    return cls(what, where=where, remedy=remedy)


class ConfigError(MegablipError):
    """The recipe, an override, or a run directory made from another recipe."""


class ShardError(MegablipError):
    """A tar shard or its index: missing, truncated, empty, changed."""


class SampleError(MegablipError):
    """One sample that can't become a document; skipped and counted."""


class PackingError(MegablipError):
    """A document or a pack that breaks an invariant of packing."""


class RankMismatchError(MegablipError):
    """Ranks disagree on what they are about to do together."""


class HangError(MegablipError):
    """A step, a wait for data or a save takes longer than its limit."""


class DeviceMemoryError(MegablipError):
    """A GPU's memory does not hold what the recipe asks of it."""


class DivergenceError(MegablipError):
    """Loss or gradient is not finite, step after step."""


class CheckpointError(MegablipError):
    """A checkpoint that can't be written, verified or loaded."""


class SupersededError(MegablipError):
    """A newer attempt owns the run directory; this process is what is left of an older one."""
