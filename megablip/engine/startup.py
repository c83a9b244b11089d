"""What makes a rank start fast; two of DeepSpeed's private names are used here, each pinned by a test."""

from __future__ import annotations


def spare_builds() -> None:
    """Keep DeepSpeed from building or compiling what training does not use.

    Where there is no GPU its process group builds a C++ extension for inference
    (half a minute, and a compiler must be there).  Its check of the optimizer
    imports Muon, whose kernels are handed to torch.compile: 4 s of imports on
    each rank, for an optimizer that is not used here.
    """
    import deepspeed
    from deepspeed.runtime import compiler

    deepspeed.ops.__compatible_ops__ = {}
    compile_later = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        compiler.compile = compile_later
