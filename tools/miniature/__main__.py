"""All stages of BLIP-3 in miniature, through the real trainer, each evaluated on held-out pictures.

    python -m tools.miniature                 the chain and its report, about 25 minutes on two cores
    python -m tools.miniature --tiny          the same path at its smallest, in its own folder
    python -m tools.miniature resolution      one of the paper's comparisons (ablations.py), several seeds

An interrupted one goes on where it was.  The chain's report is FOLDER/seed_0/report/report.html;
comparisons with the same seed use its tower and data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.miniature.ablations import ABLATIONS, run_ablation
from tools.miniature.chain import FULL, TINY, stages
from tools.stages import Chain


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=["chain", *ABLATIONS], default="chain")
    parser.add_argument("--tiny", action="store_true", help="some steps of each stage")
    parser.add_argument("--folder", type=Path, help="where everything goes (default: runs/miniature or _tiny)")
    chain_only = parser.add_argument_group("of the chain")
    chain_only.add_argument(
        "--seed", type=int, help="of digits' split, pictures, weights and order of data (default: 0)"
    )
    chain_only.add_argument("--split", choices=["test", "validation"], help="of the questions' digits (default: test)")
    comparison_only = parser.add_argument_group("of a comparison")
    comparison_only.add_argument(
        "--seeds", type=int, choices=range(1, 9), metavar="N", help="how many, 1 to 8 (default: 3)"
    )
    arguments = parser.parse_args()
    size = TINY if arguments.tiny else FULL
    folder = (arguments.folder or Path("runs") / ("miniature_tiny" if arguments.tiny else "miniature")).resolve()
    if arguments.name != "chain":
        if arguments.seed is not None or arguments.split:
            parser.error("a comparison takes --seeds; --seed and --split are the chain's")
        return run_ablation(arguments.name, folder, arguments.seeds or 3, size)
    if arguments.seeds:
        parser.error("the chain takes one --seed; --seeds is a comparison's")
    seed = arguments.seed or 0
    home = folder / f"seed_{seed}"
    chain = Chain(home)
    chain.run(stages(home, size, seed, arguments.split or "test"))
    print(f"miniature: {home / 'report' / 'report.html'} after {chain.minutes():.1f} min")


if __name__ == "__main__":
    sys.exit(main())
