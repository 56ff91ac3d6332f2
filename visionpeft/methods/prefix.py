"""Prefix tuning: attention reads learned keys and values beside its own, softmax(q [P_k; k]^T) [P_v; v].  Li & Liang 2021, https://arxiv.org/abs/2101.00190"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.anatomy import Anatomy, Unfit
from ..core.method import Edit, Method
from ..registry import METHODS
from .base import check_tokens


@METHODS.register("prefix")
@dataclass(frozen=True)
class PrefixConfig(Method):
    num_virtual_tokens: int = 10  # how many keys and values are added to each attention

    lr_scale: ClassVar[float] = 30.0
    merges: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check("num_virtual_tokens", self.num_virtual_tokens, 1, 1000)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        if not anatomy.attentions:
            raise Unfit("it has no self-attention that could read a prefix")
        if keys := max(a.keys for a in anatomy.attentions):
            check_tokens(self.name, self.num_virtual_tokens, keys, f"keys that an attention of {anatomy.model} has")
        return [
            self.edit(
                a.name,
                "forward",
                tokens=self.num_virtual_tokens,
                kind=a.kind,
                heads=a.heads,
                key_dim=a.key_dim,
                value_dim=a.value_dim,
            )
            for a in anatomy.attentions
        ]

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return Prefix(**settings)


class Prefix(nn.Module):
    """Runs an attention with its own layers, its keys and values lengthened. Replaces the module's own forward."""

    def __init__(self, tokens: int, kind: str, heads: int, key_dim: int, value_dim: int):
        super().__init__()
        self.kind = kind
        self.keys = nn.Parameter(torch.empty(heads, tokens, key_dim))
        self.values = nn.Parameter(torch.empty(heads, tokens, value_dim))
        nn.init.trunc_normal_(self.keys, std=0.02)
        nn.init.trunc_normal_(self.values, std=0.02)

    def forward(self, attention: Any, run: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kinds: dict[str, Callable[..., Tensor]] = {"global": self._global, "window": self._window, "map": self._map}
        return kinds[self.kind](attention, x, *args, **kwargs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, drop: float) -> Tensor:
        """q, k, v: (B, heads, N, dim); mask: added to the scores of the attention's own keys, (..., N, N)."""
        keys, values = (p.expand(q.shape[0], -1, -1, -1).to(q.dtype) for p in (self.keys, self.values))
        if mask is not None:
            mask = F.pad(mask, (self.keys.shape[1], 0))  # every query sees the prefix
        return F.scaled_dot_product_attention(
            q, torch.cat([keys, k], 2), torch.cat([values, v], 2), attn_mask=mask, dropout_p=drop, scale=scale
        )

    def _global(self, at: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """timm's Attention on (B, N, C)."""
        if is_causal:
            raise NotImplementedError("a prefix for causal attention is not implemented")
        b, n, _ = x.shape
        q, k, v = at.qkv(x).reshape(b, n, 3, at.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
        q, k = at.q_norm(q), at.k_norm(k)
        y = self._attend(q, k, v, at.scale, attn_mask, at.attn_drop.p if at.training else 0.0)
        y = at.norm(y.transpose(1, 2).reshape(b, n, -1)) if hasattr(at, "norm") else y.transpose(1, 2).reshape(b, n, -1)
        if getattr(at, "gate", None) is not None:
            y = y * at.gate(x).sigmoid()
        return at.proj_drop(at.proj(y))

    def _window(self, at: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """timm's WindowAttention on (windows * B, N, C), with its relative position bias."""
        b, n, _ = x.shape
        q, k, v = at.qkv(x).reshape(b, n, 3, at.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = at._get_rel_pos_bias()  # (1, heads, N, N)
        if mask is not None:  # (windows, N, N)
            bias = bias + mask.repeat(b // mask.shape[0], 1, 1).unsqueeze(1)
        y = self._attend(q, k, v, at.scale, bias, at.attn_drop.p if at.training else 0.0)
        return at.proj_drop(at.proj(y.transpose(1, 2).reshape(b, n, -1)))

    def _map(self, at: Any, x: Tensor) -> Tensor:
        """Ultralytics' Attention on (B, C, H, W)."""
        b, c, h, w = x.shape
        heads = at.qkv(x).view(b, at.num_heads, at.key_dim * 2 + at.head_dim, h * w)
        q, k, v = heads.split([at.key_dim, at.key_dim, at.head_dim], dim=2)
        y = self._attend(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3), at.scale, None, 0.0)
        return at.proj(y.transpose(2, 3).reshape(b, c, h, w) + at.pe(v.reshape(b, c, h, w)))
