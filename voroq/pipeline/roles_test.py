"""What the watched run understands, and that it refuses everything else: toy models, each with one thing wrong."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.pipeline.heads import find_heads
from voroq.pipeline.roles import find_roles

WIDTH, HEADS, VOCAB = 12, 3, 32


class Block(nn.Module):
    """Attention with three heads and an MLP, both after an RMS norm."""

    lent: Tensor | float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.e, self.f = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        self.values = self.c(x) + self.lent
        one, two, three = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.b(x), self.a(x), self.values))
        return nn.functional.scaled_dot_product_attention(one, two, three, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.d(self.attend(self.first(x)))
        return self.f(torch.tanh(self.e(self.second(x)))) + x


class Toy(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=HEADS, hidden_size=WIDTH)
        self.config.get_text_config = lambda: self.config
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(self.body(self.embed(input_ids)))[:, 0:])}

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def on_meta(make: type[nn.Module], *args: object) -> nn.Module:
    with torch.device("meta"):
        return make(*args).double().requires_grad_(False).eval()


def test_the_roles_of_a_toy():
    toy = on_meta(Toy)
    roles = find_roles(toy)
    assert (roles.width, roles.embeddings, roles.writers) == (WIDTH, ("embed",), ("blocks.0.d", "blocks.0.f", "blocks.1.d", "blocks.1.f"))
    assert {name: norm for name, norm in roles.readers.items() if "1." not in name} == {
        **dict.fromkeys(["blocks.0.a", "blocks.0.b", "blocks.0.c"], "blocks.0.first"), "blocks.0.e": "blocks.0.second", "head": "norm",
    }  # fmt: skip
    assert roles.norms == dict.fromkeys(["blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", "norm"], 0)


def test_the_values_of_a_toy():
    toy = on_meta(Toy)
    assert [(heads.value, heads.rows, heads.output, heads.dim) for heads in find_heads(toy, find_roles(toy))] == [
        (f"blocks.{block}.c", (0, WIDTH), f"blocks.{block}.d", WIDTH // HEADS) for block in range(2)
    ]


class Gated(Block):
    def attend(self, x: Tensor) -> Tensor:
        return super().attend(x) * torch.sigmoid(self.e(x)[..., :WIDTH])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.d(self.attend(self.first(x)))
        return x + self.f(torch.ones(*x.shape[:-1], 24).to(x))


def test_values_that_meet_a_gate_are_left_alone():
    toy = on_meta(Toy, Gated)
    assert find_heads(toy, find_roles(toy)) == ()


def test_values_that_another_block_uses_too_are_left_alone():
    class Lending(Toy):
        def body(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            self.blocks[1].lent = self.blocks[0].values
            return self.blocks[1](x)

    toy = on_meta(Lending)
    assert find_heads(toy, find_roles(toy)) == ()


class Layered(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)


class PlusOne(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class Peeking(Toy):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x * torch.sigmoid(x))


class Shifted(Toy):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + 1


class Storing(Toy):
    def body(self, x: Tensor) -> Tensor:
        kept = torch.zeros(x.shape, dtype=x.dtype)
        kept[:, :] = x
        return super().body(x)


class Returning(Toy):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.body(self.embed(input_ids))
        return {"logits": self.head(self.norm(x)), "hidden": x}


class Normless(Toy):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(self.embed(input_ids)))}


class Twice(Toy):
    def body(self, x: Tensor) -> Tensor:
        return self.blocks[0](super().body(x))


class Idle(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 4)


class Reused(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        added = self.extra(torch.relu(x.new_ones(x.shape)))
        self.used = torch.relu(added)
        return super().body(x + added)


class Raw(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(WIDTH, WIDTH))


class NormRead(Toy):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.norm(self.body(self.embed(input_ids)))))}


class Folded(Toy):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x.flip(-1))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Layered, "norm .LayerNorm. is no RMS norm"),
        (Peeking, "the residual stream goes into the call sigmoid"),
        (Shifted, "goes into an addition of what is no linear's output"),
        (Storing, "goes into the call __setitem__"),
        (Returning, "it returns the residual stream itself"),
        (Normless, "goes into head, without a norm"),
        (Twice, "blocks.0.first is called more than once"),
        (Idle, "tower is not called"),
        (Reused, "is added to the residual stream and used elsewhere too"),
        (Raw, "table .* is no nn.Linear"),
        (NormRead, "the call tanh reads the output of norm"),
        (Folded, "goes into the call flip"),
    ],
)
def test_one_thing_wrong_is_named(model, reason):
    with pytest.raises(VoroqError, match=f"{model.__name__} cannot be rotated: .*{reason}"):
        find_roles(on_meta(model))


def test_gains_of_one_plus_weight_are_told_from_plain_ones():
    toy = on_meta(Toy)
    toy.norm = PlusOne(WIDTH, device="meta", dtype=torch.float64)
    assert find_roles(toy).norms == {**find_roles(on_meta(Toy)).norms, "norm": 1}


def test_numbers_may_multiply_the_stream_and_what_is_added():
    class Scaled(Toy):
        def body(self, x: Tensor) -> Tensor:
            return super().body(nn.functional.dropout(2 * x, training=False) / torch.tensor(3.0)).double() * 0.5

    assert find_roles(on_meta(Scaled)) == find_roles(on_meta(Toy))
