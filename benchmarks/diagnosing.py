"""What diagnostics cost: share of a fit's time that following them takes, and seconds of a full diagnosis.

python benchmarks/diagnosing.py
"""

import time
import warnings
from unittest import mock

import celbo
from celbo.fit import train


def main() -> None:
    warnings.simplefilter("ignore")
    print("| cells x genes | fit, s | following, s | share | diagnose all cells, s |\n|---|---|---|---|---|")
    for n_cells, epochs in ((1000, 50), (3000, 30), (10_000, 10)):
        adata = celbo.simulate_cells(n_cells=n_cells, n_genes=2000, seed=0)
        follow, spent = train.use_of_latent, []

        def timed(*arguments, follow=follow, spent=spent, **options):
            started = time.perf_counter()
            found = follow(*arguments, **options)
            spent.append(time.perf_counter() - started)
            return found

        with mock.patch.object(train, "use_of_latent", timed):
            model = celbo.ExpressionVAE(conditions=["batch"], train=celbo.TrainConfig(max_epochs=epochs)).fit(adata)
        seconds = sum(epoch.seconds for epoch in model.history_)
        others = celbo.simulate_cells(n_cells=n_cells, n_genes=2000, seed=0)[::-1].copy()  # as if they were not of fit
        started = time.perf_counter()
        model.diagnose(others)
        took = time.perf_counter() - started
        print(f"| {n_cells:,} x 2,000 | {seconds:.1f} | {sum(spent):.2f} | {sum(spent) / seconds:.1%} | {took:.1f} |")


if __name__ == "__main__":
    main()
