"""Sixty constructs that users of PyTorch write: which are read, and whether an attack leaves their bounds.

Each stands between two linear layers. It is bounded in an l_inf and an l_2 ball and attacked there by random points,
corners and gradient ascent on every output. Width is the bounds' over that of what the attack reached, the mean over
outputs and the greater of the two balls; above 10 it is marked as loose.

python benchmarks/read_constructs.py              # all
python benchmarks/read_constructs.py --only norm  # those with this in their name
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main

LOOSE = 10.0  # times as wide as what the attack reached
T, N = 4, 6


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="constructs with this in their name")
    parser.add_argument("--eps", type=float, default=0.02, help="of the l_inf ball; three times it of the l_2 ball")
    parser.add_argument("--method", default="crown", help="what bounds")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
import torch.nn.functional as F
from torch import nn

from utils.certify import output_bounds
from utils.network import UnsupportedError


class Between(nn.Module):
    """A linear layer, the construct on (batch, T, N), or on images of it, and another linear layer."""

    def __init__(self, construct, shape=(T, N)):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.construct, self.shape = nn.Linear(N, N), construct, shape
        with torch.no_grad():
            size = construct(torch.randn(1, *shape)).numel()
        self.last = nn.Linear(size, 3)

    def forward(self, x):
        h = self.construct(self.first(x).reshape(len(x), *self.shape))
        return self.last(h.reshape(len(x), -1))


class Own(nn.Module):
    """Layers by name and what is done with them."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, h):
        return self.function(self, h)


class Doubled(nn.Module):
    def forward(self, weight):
        return 0.5 * (weight + weight.flip(0))


def parametrized() -> nn.Module:
    layer = nn.Linear(N, N)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def experts(own, h):
    share = own.gate(h).softmax(-1)
    return sum(share[..., k : k + 1] * expert(h) for k, expert in enumerate((own.a, own.b)))


def highway(own, h):
    gate = own.t(h).sigmoid()
    return gate * own.h(h).relu() + (1 - gate) * h


def excite(own, h):
    return h * own.up(own.down(h.mean(-1)).relu()).sigmoid()[..., None]


def lstm_of(**kwargs):
    return Own(lambda own, h: own.layer(h)[0], layer=nn.LSTM(N, 4, batch_first=True, **kwargs))


POSITIONS = torch.sin(torch.arange(T)[:, None] / 10.0 ** (torch.arange(N) / N))
MASK = torch.ones(T, T).tril().bool()


def constructs() -> dict[str, tuple]:
    """By name: what is done, and the shape that it is done to, if not (T, N)."""
    torch.manual_seed(1)
    w, image = torch.randn(N, 3), (2, 3, 4)
    line, depthwise = nn.Linear, nn.Conv2d(2, 2, 3, padding=1, groups=2)
    return {
        "RMSNorm": (nn.RMSNorm(N, eps=1e-3),),
        "RMSNorm written out": (lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-2),),
        "LayerNorm": (nn.LayerNorm(N),),
        "GroupNorm": (nn.GroupNorm(2, T),),
        "InstanceNorm1d": (nn.InstanceNorm1d(T),),
        "standardised by mean and std": (lambda h: (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 0.1),),
        "F.normalize": (lambda h: F.normalize(h, dim=-1),),
        "cosine similarity head": (lambda h: F.cosine_similarity(h[:, :, None], w.T, dim=-1),),
        "GELU": (nn.GELU(),),
        "GELU by tanh": (nn.GELU(approximate="tanh"),),
        "Mish and SiLU": (nn.Sequential(nn.Mish(), nn.SiLU()),),
        "hardswish, hardsigmoid": (nn.Sequential(nn.Hardswish(), nn.Hardsigmoid()),),
        "hardshrink": (nn.Hardshrink(),),
        "PReLU by channel": (nn.PReLU(T),),
        "maxout": (lambda h: h.reshape(-1, T, 3, 2).max(dim=-1).values,),
        "GLU": (nn.GLU(),),
        "SwiGLU": (Own(lambda o, h: o.c(F.silu(o.a(h)) * o.b(h)), a=line(N, 8), b=line(N, 8), c=line(8, N)),),
        "highway": (Own(highway, t=line(N, N), h=line(N, N)),),
        "residual block": (Own(lambda o, h: h + o.b(o.a(h).relu()), a=line(N, 8), b=line(8, N)),),
        "squeeze and excite": (Own(excite, down=line(T, 2), up=line(2, T)),),
        "mixture of experts": (Own(experts, gate=line(N, 2), a=line(N, 4), b=line(N, 4)),),
        "attention": (lambda h: F.scaled_dot_product_attention(h, h, h),),
        "attention with a causal mask": (lambda h: (h @ h.mT / 2).masked_fill(~MASK, -math.inf).softmax(-1) @ h,),
        "attention with is_causal": (lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True),),
        "nn.MultiheadAttention": (Own(lambda o, h: o.a(h, h, h)[0], a=nn.MultiheadAttention(N, 2, batch_first=True)),),
        "attention pooling": (Own(lambda o, h: (o.a(h).softmax(1) * h).sum(1), a=line(N, 1)),),
        "einsum with a constant": (lambda h: torch.einsum("btn,nk->btk", h, w),),
        "einsum of two": (lambda h: torch.einsum("bin,bjn->bij", h, h),),
        "positional encoding": (lambda h: (h + POSITIONS).relu(),),
        "learned frequencies": (Own(lambda o, h: torch.cat((o.a(h).sin(), o.a(h).cos()), -1), a=line(N, 3)),),
        "softmax with temperature": (lambda h: (h / 0.5).softmax(-1) * 2,),
        "log_softmax within": (lambda h: h.log_softmax(-1).mean(1),),
        "logsumexp pooling": (lambda h: h.logsumexp(1),),
        "variance pooling": (lambda h: torch.cat((h.mean(1), h.var(1), h.std(1)), -1),),
        "length pooling": (lambda h: torch.cat((h.norm(dim=1), h.abs().sum(1)), -1),),
        "log of a power": (lambda h: torch.log(h**2 + 1e-1),),
        "clamp and log1p": (lambda h: h.clamp(min=0).log1p(),),
        "where with a constant mask": (lambda h: torch.where(MASK[:, :1], h, h.tanh()),),
        "where by the sign": (lambda h: torch.where(h > 0, h, 0.1 * h),),
        "roll, flip, repeat": (lambda h: h.roll(1, 1) + h.flip(-1) + h[:, :1].repeat(1, T, 1),),
        "chunk, unbind, stack": (lambda h: torch.stack([p * q for p, q in (s.chunk(2, -1) for s in h.unbind(1))], 1),),
        "cumulative mean": (lambda h: h.cumsum(1) / torch.arange(1, T + 1)[:, None],),
        "AdaptiveMaxPool1d": (nn.Sequential(nn.AdaptiveMaxPool1d(1), nn.Flatten()),),
        "max and mean over time": (lambda h: torch.cat((h.max(1)[0], h.mean(1)), -1),),
        "top two": (lambda h: h.topk(2, dim=1).values,),
        "weight_norm": (nn.utils.parametrizations.weight_norm(line(N, N)),),
        "spectral_norm": (nn.utils.parametrizations.spectral_norm(line(N, N)).eval(),),
        "own parametrization": (parametrized(),),
        "Bilinear": (Own(lambda o, h: o.b(h, h.tanh()), b=nn.Bilinear(N, N, 3)),),
        "computed weights": (Own(lambda o, h: F.linear(h, F.normalize(o.w)), w=nn.Parameter(w.T.clone())),),
        "distances to prototypes": (lambda h: -torch.cdist(h, w.T),),
        "squared distances": (lambda h: -((h[:, :, None] - w.T) ** 2).sum(-1),),
        "LSTM of two directions": (lstm_of(bidirectional=True),),
        "LSTM of two layers": (lstm_of(num_layers=2, dropout=0.2),),
        "GRU cell by hand": (Own(lambda o, h: o.c(h[:, 1], o.c(h[:, 0])), c=nn.GRUCell(N, N)),),
        "depthwise separable convolution": (nn.Sequential(depthwise, nn.ReLU(), nn.Conv2d(2, 3, 1)), image),
        "interpolate": (lambda h: F.interpolate(h, scale_factor=2, mode="bilinear").relu(), image),
        "PixelShuffle": (nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.PixelShuffle(2)), image),
        "unfold": (nn.Sequential(nn.Unfold(2), nn.ReLU()), image),
        "reflection padding": (nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2, 2, 3), nn.ReLU()), image),
    }  # fmt: skip


def attacked(module: nn.Module, x: torch.Tensor, eps: float, norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest outputs found, (outputs,), inside the ball of radius eps around x, (1, T, N)."""

    def into(d: torch.Tensor) -> torch.Tensor:
        flat = d.flatten(1)
        size = flat.abs().amax(1) if norm == math.inf else flat.norm(dim=1)
        inside = d.clamp(-eps, eps) if norm == math.inf else d * (eps / size.clamp(min=eps))[:, None, None]
        return inside * (1 - 1e-9)

    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(400, *x.shape[1:], generator=generator, dtype=x.dtype)
    tried = [into(noise * eps), into(noise.sign() * eps), into(noise * 9 * eps)]
    values = [module(x + d).detach() for d in tried]
    for sign in (1.0, -1.0):
        for k in range(values[0].shape[1]):
            d = into(noise[:4] * eps)
            for _ in range(15):
                d = d.detach().requires_grad_()
                out = module(x + d)
                values.append(out.detach())
                (gradient,) = torch.autograd.grad(out[:, k].sum(), d)
                step = gradient.sign() if norm == math.inf else F.normalize(gradient.flatten(1)).view_as(gradient)
                d = into(d + sign * 0.4 * eps * step.nan_to_num())
            values.append(module(x + d).detach())
    every = torch.cat(values)
    return every.amin(0), every.amax(0)


def question(construct, shape, args) -> tuple[str, float, int]:
    """What comes of one: "read" or the reason why not, width, and outputs that the attack takes out of the bounds."""
    module = Between(construct, shape).eval().double().requires_grad_(False)
    x = torch.randn(1, T, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    width, outside = 0.0, 0
    for norm, eps in ((math.inf, args.eps), (2.0, 3 * args.eps)):
        try:
            found = output_bounds(module, x, eps, norm=norm, method=args.method)
        except (UnsupportedError, ValueError) as error:
            return " ".join(str(error).split()), 0.0, 0
        if bool(found.lower.isnan().any() | found.upper.isnan().any()):
            return "its bounds are not numbers", 0.0, 0
        least, most = attacked(module, x, eps, norm)
        room = 1e-9 * (1 + most.abs())
        inside = (found.lower[0] <= least + room) & (most <= found.upper[0] + room)
        outside += int((~inside).sum())
        width = max(width, float(((found.upper[0] - found.lower[0]) / (most - least)).mean()))
    return "read", width, outside


def main() -> None:
    args = get_args()
    torch.set_default_dtype(torch.float64)
    print("| construct | | width |\n|---|---|---|")
    total = read = outside = 0
    for name, (construct, *shape) in constructs().items():
        if args.only not in name:
            continue
        said, width, wrong = question(construct, shape[0] if shape else (T, N), args)
        total, read, outside = total + 1, read + (said == "read"), outside + wrong
        loose = ", loose" if width > LOOSE else ""
        print(f"| {name} | {said[:150]}{loose} | {f'{width:.2f}' if said == 'read' else ''} |", flush=True)
    print(f"\n{read} of {total} read; outputs outside their bounds: {outside}")
    if outside:
        sys.exit("an attack left the bounds")


if __name__ == "__main__":
    run_main(main)
