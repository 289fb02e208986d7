"""The encoder that hy3dgen does not have: points of a surface to an unordered set of latents, one about each of a few points.

As in Hunyuan3D the denoiser knows no order among its tokens, so neither may the latents have one: each starts from a point of the
shape (farthest point sampling, Qi et al. 2017), attends to all points (Zhang et al. 2023, 3DShape2VecSet, section 5) and says in
its channels where it is and what is there.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

FREQUENCIES = 5


def fourier(points: Tensor) -> Tensor:
    """[..., 3] in [-1, 1] to [..., 33]: the coordinates, and sines and cosines of pi times 1 to 16 of them."""
    angles = (points[..., None] * (torch.pi * 2.0 ** torch.arange(FREQUENCIES, device=points.device))).flatten(-2)
    return torch.cat([points, angles.sin(), angles.cos()], dim=-1)


def farthest(points: Tensor, count: int) -> Tensor:
    """Indices [B, count] into points [B, P, 3]: the first point, then always the one farthest from those chosen."""
    rows = torch.arange(len(points), device=points.device)
    chosen = [torch.zeros_like(rows)]
    distance = torch.full(points.shape[:2], torch.inf, device=points.device)
    for _ in range(count - 1):
        last = points[rows, chosen[-1]][:, None]
        distance = torch.minimum(distance, (points - last).square().sum(-1))
        chosen.append(distance.argmax(-1))
    return torch.stack(chosen, dim=1)


class Attention(nn.Module):
    """Tokens attend to a context (to themselves where there is none), then an MLP; residual, normalised before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, N, D] and [B, M, D] to [B, N, D]."""
        shape = tokens.shape[-1:]
        normal = functional.layer_norm(tokens, shape)
        q = self.to_q(normal)
        k, v = self.to_kv(normal if context is None else functional.layer_norm(context, shape)).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        tokens = tokens + self.to_out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return tokens + self.mlp(functional.layer_norm(tokens, shape))


class SurfaceEncoder(nn.Module):
    """Points [B, P, 3] of a surface to latents [B, N, C]."""

    def __init__(self, latents: int, channels: int, width: int = 128, heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        self.latents = latents
        self.embed = nn.Linear(3 + 6 * FREQUENCIES, width)
        self.cross = Attention(width, heads)
        self.blocks = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.out = nn.Linear(width, channels)

    def forward(self, points: Tensor) -> Tensor:
        """The first points should be as good as random: farthest point sampling looks at four times the latents."""
        few = points[:, : 4 * self.latents]
        index = farthest(few, self.latents)
        queries = few.gather(1, index[..., None].expand(-1, -1, 3))
        tokens = self.cross(self.embed(fourier(queries)), self.embed(fourier(points)))
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(functional.layer_norm(tokens, tokens.shape[-1:]))
