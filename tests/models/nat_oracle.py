"""transformers' Dinat, repaired: it calls functions that NATTEN no longer has, with the heads in the wrong place.

The two functions are written here over dense index tables in torch; the layout is that of transformers 4.47, before the
change that broke it. Everything else is transformers' own code.
"""

import functools
from types import ModuleType

from tests.oracles import need

torch, transformers = need("torch", "transformers")


def _window(length: int, size: int, dilation: int):
    """Keys of each position on one axis and their offsets into the bias, both [length, size]."""
    i = torch.arange(length)
    group, place = i % dilation, i // dilation
    members = (length - group + dilation - 1) // dilation
    first = torch.minimum((place - size // 2).clamp(min=0), members - size)
    steps = torch.arange(size)
    return (first[:, None] + steps) * dilation + group[:, None], (first - place)[:, None] + steps + size - 1


def scores(query, key, bias, size: int, dilation: int):
    """natten2dqkrpb: [b, h, y, x, d] twice and [h, 2 size - 1, 2 size - 1] -> [b, h, y, x, size * size]."""
    (rows, row_bias), (columns, column_bias) = (_window(n, size, dilation) for n in query.shape[2:4])
    found = torch.einsum("bhyxd,bhyixjd->bhyxij", query, key[:, :, rows][:, :, :, :, columns])
    return (found + bias[:, row_bias][:, :, :, column_bias].permute(0, 1, 3, 2, 4)).flatten(-2)


def mix(weights, value, size: int, dilation: int):
    """natten2dav: weights [b, h, y, x, size * size] and values [b, h, y, x, d] -> [b, h, y, x, d]."""
    (rows, _), (columns, _) = (_window(n, size, dilation) for n in value.shape[2:4])
    return torch.einsum(
        "bhyxij,bhyixjd->bhyxd", weights.unflatten(-1, (size, size)), value[:, :, rows][:, :, :, :, columns]
    )


def _attend(self, hidden_states, output_attentions=False):
    def heads(layer):
        return layer(hidden_states).unflatten(-1, (-1, self.attention_head_size)).permute(0, 3, 1, 2, 4)

    query = heads(self.query) / self.attention_head_size**0.5
    found = scores(query, heads(self.key), self.rpb, self.kernel_size, self.dilation)
    mixed = mix(found.softmax(-1), heads(self.value), self.kernel_size, self.dilation)
    return (mixed.permute(0, 2, 3, 1, 4).flatten(-2),)


@functools.cache
def modeling() -> ModuleType:
    """Returns transformers' module of the model, with what it needs to run."""
    try:  # with NATTEN installed, transformers imports the two names from it
        from natten import functional

        functional.natten2dqkrpb, functional.natten2dav = scores, mix
    except ImportError:
        pass
    from transformers.models.dinat import modeling_dinat

    modeling_dinat.requires_backends = lambda *_: None
    modeling_dinat.NeighborhoodAttention.forward = _attend
    return modeling_dinat


def model(**options):
    """Returns DinatForImageClassification in float64 with random weights, also where it would begin with zeros."""
    torch.manual_seed(0)
    config = transformers.DinatConfig(**options, num_labels=options.get("num_labels", 7))
    made = modeling().DinatForImageClassification(config).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made
