"""The paper's Table 4 on generated data, small: L2RE of FT, TB_Sigmoid and FARMS over five shares of the data.

    python -m benchmarks.dpot_table --out runs/table4

Flows of one viscosity and Mach number to pretrain DPOT-mini on, flows of others to fine-tune on with each setting and
seed. Every part is a run of `sciml.dpot`; stopped, the same command goes on, and finished parts are kept.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks._common import machine, write
from sciml.config import Config
from sciml.dpot import resume, start
from sciml.flow_config import FlowConfig, file_name
from sciml.generate import generate
from sciml.preparation import PRETRAIN_FLOW

RATIOS = (0.05, 0.1, 0.25, 0.5, 1.0)
FLOW = FlowConfig(mach=1.0, eta=0.01, zeta=0.01, size=32, count=400, seed=2)


def main() -> None:
    """Run what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/table4"), help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=20, help="of fine-tuning, at every share")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--results", default="benchmarks/results/dpot_table.json", help="file for the results, JSON")
    args = parser.parse_args()

    small = Config(resolution=32, patch_size=4, batch_size=8, model="mini", normalize=True, learning_rate=1e-3)
    data = generate(args.out / file_name(FLOW), FLOW)
    pretrain = generate(args.out / "pretrain" / file_name(PRETRAIN_FLOW), PRETRAIN_FLOW)
    run_once(args.out / "start", dataclasses.replace(small, tb="none", data=str(pretrain), epochs=12))
    weights = args.out / "start" / "none" / "seed0" / "model.safetensors"
    rows = {}
    for ratio in args.ratios:
        settings = {"ratio": ratio, "epochs": args.epochs, "seeds": tuple(args.seed), "weights": weights}
        config = dataclasses.replace(small, tb="farms", against=("none", "sigmoid"), data=str(data), **settings)
        rows[str(ratio)] = run_once(args.out / f"ratio{ratio}", config)
    print(f"\n{'share':>6} {'before':>10}" + "".join(f"{tb:>24}" for tb in ("none", "sigmoid", "farms")))
    for ratio, row in rows.items():
        cells = (row["settings"][tb]["last"] for tb in ("none", "sigmoid", "farms"))
        numbers = "".join(f"{cell['mean']:15.4f} +- {cell['std']:.4f}" for cell in cells)
        print(f"{float(ratio):6.0%} {row['before']['test_l2re']:10.4f}{numbers}")
    write(args.results, {"machine": machine(), "settings": vars(args), "flow": dataclasses.asdict(FLOW), "rows": rows})
    print(f"written to {args.results}")


def run_once(run: Path, config: Config) -> dict[str, Any]:
    """Run an experiment in a directory of its own, from where it stands, and returns its summary."""
    summary = run / "summary.json"
    if not summary.is_file():
        tqdm.write(resume(run) if (run / "config.json").is_file() else start(config, run))
    return json.loads(summary.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
