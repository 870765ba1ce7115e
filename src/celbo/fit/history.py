"""The history of a fit: a record per epoch."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from celbo.fit.train import Epoch

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["History"]


class History(list[Epoch]):
    """One `celbo.fit.train.Epoch` per pass over the training cells."""

    def to_frame(self) -> "pd.DataFrame":
        """Make a table with a row per epoch; ``kl_per_dim`` is spread over columns ``kl_0``, ``kl_1``, ..."""
        import pandas as pd

        frame = pd.DataFrame([asdict(epoch) for epoch in self]).drop(columns="kl_per_dim")
        kl = pd.DataFrame([epoch.kl_per_dim for epoch in self]).add_prefix("kl_")
        return pd.concat([frame, kl], axis=1)

    def __repr__(self) -> str:
        """Show the number of epochs, and the held-out ELBO at the end."""
        last = self[-1] if self else None
        if last is None or last.validation_elbo is None:
            return f"History({len(self)} epochs)"
        return f"History({len(self)} epochs, held-out ELBO {last.validation_elbo:,.1f} nats per cell at the end)"
