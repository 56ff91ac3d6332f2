"""LoRA: W + (alpha / r) B A.  Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised: alpha / sqrt(r), Kalajdzievski 2023, https://arxiv.org/abs/2312.03732; A frozen (LoRA-FA): Zhang et al. 2023, https://arxiv.org/abs/2308.03303; factors that start from the weight's own: PiSSA, Meng et al. 2024, https://arxiv.org/abs/2404.02948, and OLoRA, Büyükakyüz 2024, https://arxiv.org/abs/2406.01775"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.anatomy import Anatomy, Layer
from ..core.method import Edit, Method, PeftFields, PeftLayer, PeftPart, Settings
from ..errors import ConfigError
from ..registry import METHODS
from ._updates import Update, UpdateConfig, matrix
from .base import computes_plainly


@METHODS.register("lora")
@dataclass(frozen=True)
class LoraConfig(UpdateConfig):
    lora_alpha: float = 8.0  # the update is scaled by lora_alpha / r
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead
    lora_dropout: float = 0.0  # probability with which the update's input is dropped while training
    qkv: str = "qkv"  # which of q, k and v of a fused projection
    lora_fa: bool = False  # only B trains, A stays as it was drawn: with lean, a layer keeps r channels instead of its input
    budget: str | float = ""  # "2%" of the unfrozen body trains: gradients of some images share it out, in place of r
    init_lora_weights: str = "kaiming"  # or "pissa": the weight's largest singular vectors, "olora": its QR decomposition

    expected_gain: ClassVar[float | None] = 0.93
    peft_type: ClassVar[str] = "LORA"
    peft_dora: ClassVar[bool] = False  # peft has DoRA as an option of its LoRA
    peft_fields: ClassVar[frozenset[str]] = frozenset({"r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lora_dropout", self.lora_dropout, 0.0, 0.99)
        if not self.qkv or not set(self.qkv) <= set("qkv"):
            raise ConfigError(f"{self.name}: qkv='{self.qkv}' is not understood; give some of the letters q, k and v")
        self.check_choice("init_lora_weights", ("kaiming", *FROM_WEIGHT))
        if self.budget != "":
            self._share()
            if self.rank_pattern:
                raise ConfigError(f"{self.name}: budget gives every layer its rank, and so does rank_pattern; leave one out")

    @property
    def needs_gradients(self) -> bool:
        return self.budget != ""

    def train(self, anatomy: Anatomy) -> Iterable[str]:
        return super(LoraConfig, self.ranked(anatomy)).train(anatomy)

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        return super(LoraConfig, self.ranked(anatomy)).edits(anatomy)

    def ranked(self, anatomy: Anatomy) -> LoraConfig:
        """Return this method with the ranks that `budget` gives the layers.

        A layer's share of the parameters is its share of the sensitivity, the sum of |w g| over its weights (as in GoRA, He et
        al. 2025, https://arxiv.org/abs/2502.12171): one rank after the other goes to the layer with the most sensitivity for
        each parameter that it would then have (D'Hondt's rule). What scales an update is the same as without a budget.
        """
        if not self.needs_gradients:
            return self
        assert anatomy.gradient_stats  # make_plan sees to it
        whole = replace(self, budget="", small_layers=0.0, oversize="skip", rank_pattern={})
        left = self._share() * sum(p.numel for p in anatomy.body)
        left -= sum(p.numel for p in anatomy.body if p.role.startswith("norm") and self.train_norms)
        ranks: dict[str, int] = {}
        queue: list[tuple[float, str, int, int, Layer]] = []  # by sensitivity for each parameter, the most first

        def offer(layer: Layer, rank: int, before: int) -> None:
            at = replace(whole, r=rank)
            if at.fits(layer):
                product = anatomy.gradient_stats.product.get(f"{layer.name}.weight", 0.0)  # type: ignore[union-attr]
                cost = at.trained(layer)
                heapq.heappush(queue, (-product / cost, layer.name, rank, cost - before, layer))

        for layer in self.targets(anatomy):
            offer(layer, 1, 0)
        while queue:
            _, name, rank, more, layer = heapq.heappop(queue)
            if more <= left:
                ranks[name], left = rank, left - more
                offer(layer, rank + 1, replace(whole, r=rank).trained(layer))
        if not ranks:
            norms = " beside the normalisations (train_norms)" if self.train_norms else ""
            raise ConfigError(
                f"{self.name}: budget={self.budget} leaves no rank for any layer{norms}; give more of the body, or fewer targets"
            )
        names = {re.escape(name): rank for name, rank in ranks.items()}
        power = 0.5 if self.use_rslora else 1.0
        alphas = {name: self.lora_alpha * (rank / self.r) ** power for name, rank in names.items()}
        return replace(
            whole, target_modules="|".join(names), rank_pattern=names, alpha_pattern={**self.alpha_pattern, **alphas}
        )

    def _share(self) -> float:
        """Return the budget as a share of the body."""
        text = str(self.budget).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise ConfigError(f"{self.name}: budget='{self.budget}' is not understood; give a share of the body, e.g. '2%'")
        return share

    @staticmethod
    def build(**settings: Any) -> nn.Module:
        return LowRank(**settings)

    def to_peft(self, part: Any, layer: nn.Module) -> PeftLayer | None:
        if not _as_peft(layer):
            return None
        up, down = part.whole()
        return self._peft_layer(up, down, part.scaling, part.shape)

    def change_to_peft(self, layer: Any, before: Tensor) -> PeftLayer | None:
        if not _as_peft(layer):
            return None
        change = (layer.weight - before).flatten(1)
        ones = torch.eye(min(change.shape))
        up, down = (ones, change) if change.shape[0] <= change.shape[1] else (change, ones)
        return self._peft_layer(up, down, 1.0, before.shape)

    def _peft_layer(self, up: Tensor, down: Tensor, scaling: float, shape: Sequence[int]) -> PeftLayer:
        r = len(down)
        tensors = {"lora_A.weight": down.view(r, *shape[1:]), "lora_B.weight": up.view(shape[0], r, *[1] * (len(shape) - 2))}
        alpha = scaling * (math.sqrt(r) if self.use_rslora else r)
        options = {"use_rslora": self.use_rslora, "use_dora": self.peft_dora, "init_lora_weights": True, "bias": "none"}
        return PeftLayer(tensors, {"r": r, "lora_alpha": round(alpha, 9), "lora_dropout": self.lora_dropout, **options})

    @classmethod
    def from_peft(cls, fields: PeftFields) -> Method | None:
        if bool(fields.get("use_dora")) != cls.peft_dora:
            return None
        first = fields.get("init_lora_weights", True)
        if first not in _BASE_UNCHANGED:
            raise ConfigError(
                f"init_lora_weights={first!r} changed the base's own weights before it was trained; save the adapter from "
                "peft with path_initial_model_for_weight_conversion=..., which makes a plain LoRA of it"
            )
        return super().from_peft({k: v for k, v in fields.items() if k != "init_lora_weights"})

    def read_peft(self, layer: nn.Module, saved: PeftLayer) -> PeftPart | None:
        if not _as_peft(layer):
            return None
        tensors = {n: saved.tensors[f"{n}.weight"].flatten(1) for n in ("lora_A", "lora_B")}
        return PeftPart(self.part_of_peft(layer, saved), tensors)

    def cost(self, layer: Layer) -> int:
        """Return the count of parameters of one layer's update."""
        rows, columns = matrix(layer)
        chosen = self._rows(layer)
        if chosen is None:
            return self.rank(layer) * (rows + columns)
        return self.rank(layer) * (sum(b - a for group in chosen for a, b in group) + len(chosen) * columns)

    def trained(self, layer: Layer) -> int:
        """Return the count of those that train."""
        fixed = self.rank(layer) * matrix(layer)[1] * len(self._rows(layer) or "W") if self.lora_fa else 0
        return self.cost(layer) - fixed

    def _rows(self, layer: Layer) -> list | None:
        """Return the rows of each chosen projection of a fused qkv, or None for the whole matrix."""
        if not layer.slices or set(self.qkv) == set("qkv"):
            return None
        return [[list(span) for span in layer.slices[name]] for name in "qkv" if name in self.qkv]

    def part(self, layer: Layer) -> Settings:
        r = self.rank(layer)
        scaling = self.alpha_of(layer, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)
        settings: dict[str, Any] = {"shape": list(layer.shape), "r": r, "scaling": scaling}
        if self.lora_fa:
            settings["fixed"] = True
        if rows := self._rows(layer):
            settings["rows"] = rows
        if self.init_lora_weights != "kaiming":
            most = min((sum(b - a for a, b in group) for group in rows or ()), default=r)
            if r > most:
                raise ConfigError(
                    f"{self.name}: {layer.name} has {most} rows for each of q, k and v, so init_lora_weights="
                    f"'{self.init_lora_weights}' has no {r} factors for it; give a rank up to {most}"
                )
            settings["init"] = self.init_lora_weights
        if self.lora_dropout:
            if not layer.linear:
                raise ConfigError(f"{layer.name} normalises its weight, so lora_dropout has no meaning there; use 0")
            settings["dropout"] = self.lora_dropout
        return settings


class LowRank(Update):
    """The update (alpha / r) B A of a weight of any shape, seen as a matrix of `shape[0]` rows.

    Where its factors start from the weight's own, A0 and B0, the layer keeps its weight, and what is learned are their changes
    A and B, from zero: W + (alpha / r) ((B0 + B) (A0 + A) - B0 A0). So the start is the base exactly, weight decay leads back
    to it, and half precision rounds the changes alone.
    """

    lora_A: Tensor
    start_A: Tensor
    start_B: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        r: int,
        scaling: float,
        rows: Sequence | None = None,
        dropout: float = 0.0,
        fixed: bool = False,
        init: str = "kaiming",
    ):
        super().__init__()
        self.scaling, self.dropout, self.shape, self.init = scaling, dropout, tuple(shape), init
        spans = [(a, b) for group in rows or () for a, b in group]
        if strange := next(((a, b) for a, b in spans if not 0 <= a <= b <= shape[0]), None):
            raise ValueError(f"rows {strange[0]} to {strange[1]} of a weight that has {shape[0]}")
        self.rows = [sum(b - a for a, b in group) for group in rows or ()] or [shape[0]]  # how many rows each B has
        index = torch.cat([torch.arange(a, b) for a, b in spans]) if spans else None  # where those rows stand in the weight
        self.register_buffer("index", index, persistent=False)
        self.index: Tensor | None
        down, up = torch.empty(len(self.rows) * r, math.prod(shape[1:])), torch.zeros(sum(self.rows), r)
        self.moves = init != "kaiming" and not fixed  # whether A and B are changes of factors that the layer starts from
        if self.moves:
            self.register_buffer("start_A", torch.zeros_like(down))
            self.register_buffer("start_B", torch.zeros_like(up))
        down = nn.init.kaiming_uniform_(down, a=math.sqrt(5)) if init == "kaiming" else down.zero_()
        if fixed:  # LoRA-FA
            self.register_buffer("lora_A", down)
        else:
            self.lora_A = nn.Parameter(down)
        self.lora_B = nn.Parameter(up)

    def start(self, layer: nn.Module) -> None:
        """Set the factors to start from, if any, from the layer's own weight."""
        if self.init == "kaiming":
            return
        matrix: Tensor = layer.weight.detach().flatten(1)  # type: ignore[operator, assignment, union-attr]
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        chosen = matrix if self.index is None else matrix[self.index.to(matrix.device)]
        r = self.lora_B.shape[1]
        ups, downs = zip(*(FROM_WEIGHT[self.init](part, r, self.scaling) for part in chosen.split(self.rows)), strict=True)
        with torch.no_grad():
            if self.moves:
                self.start_A.copy_(torch.cat(downs))
                self.start_B.copy_(torch.cat(ups))
            else:  # with A fixed, B0 makes no difference to how B moves
                self.lora_A.copy_(torch.cat(downs))

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """Return the factors U (rows, k) and V (k, columns) of the update, one pair for each group of rows."""
        pairs = _pairs(self.lora_B, self.lora_A, self.rows)
        if not self.moves:
            return pairs
        # (B0 + B) (A0 + A) - B0 A0 = (B0 + B) A + B A0, without a difference of what is nearly the same
        starts = _pairs(self.start_B, self.start_A, self.rows)
        return [
            (torch.cat([up0 + up, up], 1), torch.cat([down, down0]))
            for (up, down), (up0, down0) in zip(pairs, starts, strict=True)
        ]

    def update(self) -> Tensor:
        with torch.autocast(self.lora_A.device.type, enabled=False):
            if self.index is None:
                [(up, down)] = self.products()
                return (self.scaling * up @ down).view(self.shape)
            update = torch.cat([up @ down for up, down in self.products()])
            whole = update.new_zeros(self.shape[0], update.shape[1])
            return whole.index_copy(0, self.index, self.scaling * update).view(self.shape)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return `products` as one pair, (outputs, k) and (k, columns)."""
        pairs = self.products()
        if self.index is None:
            return pairs[0]
        up = self.lora_B.new_zeros(self.shape[0], sum(len(v) for _, v in pairs))
        up[self.index] = torch.block_diag(*(u for u, _ in pairs))
        return up, torch.cat([v for _, v in pairs])

    def forward(self, weight: Tensor) -> Tensor:
        if self.index is not None or torch.is_autocast_enabled(weight.device.type):
            return super().forward(weight)
        [(up, down)] = self.products()
        return torch.addmm(weight.flatten(1), up, down, alpha=self.scaling).view(self.shape)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, float] | None:
        """Return weight, U, V and s where the result is weight + s U V as matrices: a cheaper backward."""
        return None if self.index is not None else (weight, *self.products()[0], self.scaling)


_BASE_UNCHANGED = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights that leave the base as it is


def _as_peft(layer: nn.Module) -> bool:
    """Return whether peft's LoRA (0.21) is an update of this layer's weight: its A knows neither groups nor dilation."""
    single = getattr(layer, "groups", 1) == 1 and set(getattr(layer, "dilation", (1,))) == {1}
    return computes_plainly(layer) and single


def _pairs(up: Tensor, down: Tensor, rows: list[int]) -> list[tuple[Tensor, Tensor]]:
    if len(rows) == 1:
        return [(up, down)]
    return list(zip(up.split(rows), down.chunk(len(rows)), strict=True))


def _pissa(matrix: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return B0 and A0 whose scaled product is the best approximation of rank r, as HF peft has it."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    return _signed(u[:, :r] * root, root.unsqueeze(1) * v[:r])


def _olora(matrix: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return as B0 and A0 the first r columns of Q and rows of R, as HF peft has it: unscaled."""
    q, upper = torch.linalg.qr(matrix)
    return _signed(q[:, :r], upper[:r])


def _signed(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs with their signs such that the largest number of a column of `up` is positive: libraries differ in it."""
    signs = up.gather(0, up.abs().argmax(0, keepdim=True)).sign()
    return up * signs, down * signs.t()


FROM_WEIGHT = {"pissa": _pissa, "olora": _olora}
