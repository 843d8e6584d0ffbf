"""A small network in torch and the same one in NNX: an embedding, linear layers, a convolution."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.oracles import need

torch, peft = need("torch", "peft")
TARGETS = ["emb", "layers.0", "layers.1", "conv"]
TOKENS = np.array([[1, 5, 3, 0, 7, 12], [4, 4, 2, 9, 11, 6]])


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(13, 12)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(12, 16), torch.nn.Linear(16, 12, bias=False)])
        self.conv = torch.nn.Conv2d(12, 10, 3, padding=1, stride=(1, 2))
        self.head = torch.nn.Linear(10, 7)

    def forward(self, tokens):
        x = self.emb(tokens)
        for layer in self.layers:
            x = torch.nn.functional.silu(layer(x))
        x = self.conv(x.reshape(-1, 2, 3, 12).permute(0, 3, 1, 2))
        return self.head(x.mean((2, 3)))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.emb = nnx.Embed(13, 12, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(12, 16, rngs=rngs), nnx.Linear(16, 12, use_bias=False, rngs=rngs)])
        self.conv = nnx.Conv(12, 10, (3, 3), strides=(1, 2), padding=1, rngs=rngs)
        self.head = nnx.Linear(10, 7, rngs=rngs)

    def __call__(self, tokens):
        x = self.emb(tokens)
        for layer in self.layers:
            x = nnx.silu(layer(x))
        return self.head(self.conv(x.reshape(-1, 2, 3, 12)).mean((1, 2)))


def pair():
    """Returns both, with the same random weights."""
    torch.manual_seed(0)
    theirs, ours = TorchNet(), Net()
    given = {name: w.numpy().copy() for name, w in theirs.state_dict().items()}
    ours.emb.embedding.set_value(jnp.asarray(given["emb.weight"]))
    ours.conv.kernel.set_value(jnp.asarray(given["conv.weight"].transpose(2, 3, 1, 0)))
    ours.conv.bias.set_value(jnp.asarray(given["conv.bias"]))
    for name, layer in (("layers.0", ours.layers[0]), ("layers.1", ours.layers[1]), ("head", ours.head)):
        layer.kernel.set_value(jnp.asarray(given[f"{name}.weight"].T))
        if f"{name}.bias" in given:
            layer.bias.set_value(jnp.asarray(given[f"{name}.bias"]))
    return theirs, ours


def randomise(model, size=0.3):
    """Moves every trained parameter of a torch model away from where it started, the same way each time."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape)
                parameter.mul_(1 + 0.1 * noise) if "magnitude" in name else parameter.add_(size * noise)


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()
