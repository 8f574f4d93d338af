"""Writes the files beside it, in an environment of its own: `pip install paddlepaddle==3.3.1`, then run this.

Every tensor holds what `numbers` says for its name, so that a test knows what must come out of the files.
"""

from __future__ import annotations

import zlib
from pathlib import Path

HERE = Path(__file__).parent


def numbers(name: str, count: int) -> list[float]:
    """Multiples of 1/8 that every floating-point dtype holds exactly, from a start that depends on the name."""
    start = zlib.crc32(name.encode()) % 64
    return [((start + n) % 128 - 64) / 8 for n in range(count)]


def main() -> None:
    """Write all files."""
    import paddle
    from paddle import nn

    net = nn.LayerDict(
        {
            "embed": nn.Embedding(5, 4),
            "fc": nn.Linear(4, 4),
            "head": nn.Linear(4, 3),
            "conv": nn.Conv2D(2, 3, 3),
            "up": nn.Conv2DTranspose(3, 2, 2),
            "bn": nn.BatchNorm2D(3),
            "norm": nn.InstanceNorm2D(3),
            "act": nn.PReLU(3),
            "lstm": nn.LSTM(4, 3, direction="bidirect"),
            "attn": nn.MultiHeadAttention(4, 2),
        }
    )
    for name, tensor in net.state_dict().items():
        # of two names of one weight the later one counts; the test knows
        tensor.set_value(paddle.to_tensor(numbers(name, tensor.size), dtype="float32").reshape(tensor.shape))
    for protocol in (2, 4):
        paddle.save(net.state_dict(), str(HERE / f"net_p{protocol}.pdparams"), protocol=protocol)
    small = {name: tensor for name, tensor in net.state_dict().items() if name.startswith(("fc", "bn"))}
    paddle.save({"model": small, "epoch": 3}, str(HERE / "nested.pdparams"))
    paddle.save({k: v.astype("bfloat16") for k, v in small.items()}, str(HERE / "bf16.pdparams"))
    optimizer = paddle.optimizer.Adam(parameters=net["fc"].parameters())
    net["fc"](paddle.ones([1, 4])).sum().backward()
    optimizer.step()
    paddle.save(optimizer.state_dict(), str(HERE / "adam.pdopt"))

    paddle.seed(0)
    parts = nn.LayerDict(
        {
            "mlp": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1D(4), nn.ReLU(), nn.Linear(4, 2)),
            "lstm": nn.LSTM(4, 3, direction="bidirect"),
            "attn": nn.MultiHeadAttention(4, 2),
        }
    )
    x = paddle.randn([6, 5, 4])
    parts["mlp"](x[:, 0])  # a step in training mode moves the running averages away from 0 and 1
    parts.eval()
    y = {"mlp": parts["mlp"](x[:, 0]), "lstm": parts["lstm"](x)[0], "attn": parts["attn"](x, x, x)}
    paddle.save({"net": parts.state_dict(), "seen": {"x": x, **y}}, str(HERE / "forward.pdparams"))


if __name__ == "__main__":
    main()
