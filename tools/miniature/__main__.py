"""All stages of BLIP-3 in miniature, through the real trainer, each evaluated on held-out pictures.

    python -m tools.miniature                 the chain and its report, about 25 minutes on two cores
    python -m tools.miniature --tiny          the same path at its smallest, to see that all works
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
    parser.add_argument("--seed", type=int, default=0, help="of digits' split, pictures, weights and order of data")
    parser.add_argument(
        "--seeds", type=int, default=3, choices=range(1, 9), metavar="N", help="of a comparison, 1 to 8"
    )
    parser.add_argument(
        "--split", choices=["test", "validation"], default="test", help="held-out digits of the chain's questions"
    )
    parser.add_argument("--folder", type=Path, help="where everything goes (default: runs/miniature)")
    arguments = parser.parse_args()
    size = TINY if arguments.tiny else FULL
    folder = (arguments.folder or Path("runs") / "miniature").resolve()
    if arguments.name != "chain":
        return run_ablation(arguments.name, folder, arguments.seeds, size)
    home = folder / f"seed_{arguments.seed}"
    chain = Chain(home)
    chain.run(stages(home, size, arguments.seed, arguments.split))
    print(f"miniature: {home / 'report' / 'report.html'} after {chain.minutes():.1f} min")


if __name__ == "__main__":
    sys.exit(main())
