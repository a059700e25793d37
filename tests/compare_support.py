"""Records of a comparison without its training."""

from collections.abc import Callable
from dataclasses import asdict

from ada2ms.compare.protocol import Protocol, Record, Run


def finish(protocol: Protocol, accuracy: Callable[[Run], float], limit: int | None = None) -> dict[str, Record]:
    """Records of all runs, or of the first so many, of the accuracies that a function of the run gives."""
    records: dict[str, Record] = {}
    while pending := protocol.pending(records):
        for run in pending:
            if len(records) == limit:
                return records
            found: Record = {"run": asdict(run), "diverged": False, "train_loss": 0.1}
            found["validation"] = {"accuracy": accuracy(run), "loss": 1.0}
            if run.stage == "test":
                found["test"] = {"accuracy": accuracy(run), "loss": 1.0}
            records[run.key] = found
    return records
