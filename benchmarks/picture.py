"""Draw the figures of throughput.py, scaling.py and time_to_quality.py: speed and time to quality, against cells.

    python benchmarks/picture.py FOLDER docs/images/speed.svg

FOLDER has what these wrote with ``--json``: throughput.json, scaling.json, quality.json. Minibatches of 128, nb.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

OURS, THEIRS = {"color": "#0b6e99", "marker": "o", "label": "celbo"}, {"color": "#b5541c", "marker": "s"}


def draw(folder: Path, picture: Path) -> None:
    throughput, scaling, quality = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("throughput", "scaling", "quality")
    )
    steady = next(row for row in throughput if (row["likelihood"], row["batch_size"]) == ("nb", 128))
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "celbo", "axes.spines.top": False, "axes.spines.right": False})
    figure, (speed, seconds) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")

    speed.plot([row["cells"] for row in scaling], [1e6 / row["us_a_cell"] for row in scaling], **OURS)
    theirs = sorted([(row["trained"], row["scvi_speed"]) for row in quality])
    speed.plot(*zip(*theirs, strict=True), linestyle="none", label="scvi-tools 1.4.2", **THEIRS)
    speed.axhline(steady["products_only"], color="#777777", linestyle=":", label="matrix products alone")
    speed.set(xlabel="cells", ylabel="cells a second in training", xscale="log", yscale="log")
    speed.set_ylim(1e3, 1e5)
    speed.legend(frameon=False)

    by_set = defaultdict(list)
    for row in quality:
        by_set[row["set"]].append((row["trained"], row["seconds"], row["scvi"]))
    n_cells, ours, theirs = np.array(sorted(np.median(rows, axis=0).tolist() for rows in by_set.values())).T
    seconds.plot(n_cells, ours, linestyle="none", **OURS)
    seconds.plot(n_cells, theirs, linestyle="none", label="scvi-tools 1.4.2, in full", **THEIRS)
    seconds.set(xlabel="cells trained on", ylabel="seconds to the same log p(x)", xscale="log", yscale="log")
    seconds.legend(frameon=False)
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(options.folder, options.picture)


if __name__ == "__main__":
    main()
