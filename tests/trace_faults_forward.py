"""Faults of the forward pass, whose outputs are recorded: the first module that differs is named."""

from typing import Any


def evaluated(net: Any) -> None:
    net[1].eval()


def widened(net: Any, opt: Any, i: int) -> None:
    if i == 1:
        net[1].eps = 1e-3


def forward(fault: Any, keras: dict[str, Any]) -> list[Any]:
    """The faults.

    Args:
        fault: the class.
        keras: options of the scripts in Keras.
    """

    def attention(name: str, place: str, change: dict[str, Any], **more: Any) -> Any:
        return fault(name, "forward", "everything", change, place=place, script="attention", **more)

    outputs = {"outputs": True}
    return [
        attention("softmax over another axis", "4.dense", {"axis": -2}, b="jax"),
        attention("a missing residual", "5.norm", {"residual": False}, b="keras", base_b=keras),
        attention("attention that is not scaled", "4.dense", {"scale": 1.0}, a="jax"),
        attention("attention to letters that follow", "4.dense", {"causal": False}, a="keras", b="jax", base_a=keras),
        attention("attention to padding", "4.dense", {"padding": False}, quick=True),
        fault(
            "a BatchNorm in evaluation mode",
            "forward",
            "everything",
            {"start": evaluated},
            base={**outputs, "batch_norm": {}},
            place="1.norm",
            also="in the stage 'statistics'",
        ),
        fault(
            "an epsilon of LayerNorm that changes in mid-run",
            "forward",
            "everything",
            {"after": widened},
            base=outputs,
            place="1.norm",
            step=3,
        ),
        fault(
            "GELU by tanh",
            "forward",
            "everything",
            {"activation": "gelu by tanh"},
            base={**outputs, "activation": "gelu"},
            place="2.dense",
        ),
        fault("ReLU for tanh", "forward", "everything", {"activation": "relu"}, a="jax", base=outputs, place="2.dense"),
    ]
