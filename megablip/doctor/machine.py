"""What `megablip doctor` finds, and versions and memory of the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megablip import __version__
from megablip.doctor import all_findings
from megablip.doctor.result import Place, Result


def check(place: Place) -> Iterator[Result]:
    yield Result("type", place.device.type)
    yield Result("megablip", __version__)
    for finding in all_findings():
        yield Result(finding.subject, finding.found, remedy=finding.remedy, failed=not finding.ok)
    if place.on_gpu:
        properties = torch.cuda.get_device_properties(place.device)
        yield Result("compute capability", f"{properties.major}.{properties.minor}")
        yield Result("device memory", "in all", properties.total_memory / 2**30, "GiB")
        free, _ = torch.cuda.mem_get_info(place.device)
        yield Result("device memory, free", "now; other processes hold the rest", free / 2**30, "GiB")
        yield Result("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        yield Result("cuDNN", str(torch.backends.cudnn.version()))
