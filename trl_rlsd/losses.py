"""The clipped surrogate with token credit: a plain torch specification and its fused twin on Liger's chunked base.

    log-probs, token advantages -> loss of each token -> scalar                                       the specification
    hidden states x LM head -> log-probs -> token advantages -> scalar and gradients, rows by rows    the twin

Both are the same function, `clipped_surrogate`: every loss type of TRL 1.16 is a sum over rows of a row's factor times
the sum of its tokens' losses, so a chunk of rows gives its share of the loss once the factors of the whole batch are
known. Within a chunk the credit is formed from the log-probs that were just computed: no second pass of the student,
and no logits beyond one tile of Liger's.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl import GRPOConfig
from trl.kernels import ChunkedLogProbFunction


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")

# Tokens of a chunk of rows. Liger tiles the vocabulary inside (2048 tokens x 4096 entries in float32), so a chunk
# that is smaller than its tile only adds passes over the gradient of the head.
_CHUNK_TOKENS = 2048
_VOCABULARY_TILE = 8192


@dataclass(frozen=True)
class Surrogate:
    """What shapes the loss; names and defaults are GRPOConfig's.

    Raises: ValueError, for an unknown loss type or importance-sampling level.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)  # where A > 0, elsewhere
    vespo_k: tuple[float, float] = (2.0, 3.0)  # where A >= 0, elsewhere
    vespo_lambda: tuple[float, float] = (3.0, 2.0)

    def __post_init__(self):
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r} is unknown; choose one of {', '.join(LOSS_TYPES)}.")
        if self.importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} must be 'token' or 'sequence'."
            )

    @classmethod
    def from_config(cls, config: GRPOConfig) -> Surrogate:
        """What a GRPOConfig says of the loss."""
        same = ("loss_type", "importance_sampling_level", "delta", "beta", "use_bias_correction_kl")
        return cls(
            **{name: getattr(config, name) for name in same},
            epsilon_low=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            sapo_temperatures=(config.sapo_temperature_pos, config.sapo_temperature_neg),
            vespo_k=(config.vespo_k_pos, config.vespo_k_neg),
            vespo_lambda=(config.vespo_lambda_pos, config.vespo_lambda_neg),
        )


@dataclass(frozen=True)
class SurrogateBatch:
    """The tensors of a micro-batch that the loss reads beside log-probs and advantages.

    Shapes: `mask`, `old_logps`, `ref_logps` (B, T); `factors` (B,), see `row_factors`; `sampling_ratio` (B, T) or
    (B, 1), the ratio of trainer and sampler (vLLM). `old_logps=None` means that this is the policy that sampled.
    """

    mask: torch.Tensor
    factors: torch.Tensor
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    sampling_ratio: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> SurrogateBatch:
        return replace(self, **{k: v[index] for k, v in vars(self).items() if v is not None})


def row_factors(
    loss_type: str,
    mask: torch.Tensor,
    *,
    max_completion_length: int,
    accumulation_steps: float = 1.0,
    num_items: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """What each row's sum of token losses is multiplied with, so that the sum over rows is TRL's loss.

        grpo, sapo              1 / (tokens of the row * B)        the mean of means
        bnpo                    1 / (tokens of the batch)
        dr_grpo                 1 / (B * max_completion_length)
        luspo                   1 / B
        dapo, cispo, vespo      1 / num_items                      tokens of the accumulation window, per process

    all but the last also by 1 / accumulation_steps. One row of T tokens: 1 / T for grpo, bnpo and dapo.

    Shapes: `mask` (B, T), 1 = counts; returns (B,). Source: TRL 1.16, `GRPOTrainer`.
    """
    mask = mask.to(torch.promote_types(mask.dtype, torch.float32))
    rows, tokens = mask.size(0), mask.sum(1)
    if loss_type in ("grpo", "sapo"):
        factors = 1.0 / (tokens.clamp(min=1.0) * rows)
    elif loss_type == "bnpo":
        factors = (1.0 / tokens.sum().clamp(min=1.0)).expand(rows)
    elif loss_type == "dr_grpo":
        factors = torch.full_like(tokens, 1.0 / (rows * max_completion_length))
    elif loss_type == "luspo":
        factors = torch.full_like(tokens, 1.0 / rows)
    else:
        items = tokens.sum().clamp(min=1.0) if num_items is None else num_items
        return torch.ones_like(tokens) / items
    return factors / accumulation_steps


def clipped_surrogate(
    logps: torch.Tensor, advantages: torch.Tensor, batch: SurrogateBatch, surrogate: Surrogate
) -> torch.Tensor:
    """The loss of GRPO and its kin with token advantages.

        ratio_t = exp(logp_t - old_logp_t)                    of the sequence's mean log-ratio at level "sequence"
        loss_t  = -min(ratio_t * A_t, clip(ratio_t, 1 - eps_low, 1 + eps_high) * A_t) * sampling_ratio_t + beta * KL_t
        loss    = sum over rows of factor * sum over tokens of loss_t

    with TRL's variants of the second line by loss type. On the sampling policy ratio = 1, so the loss is minus the
    weighted mean of A and its gradient minus that of A_t * logp_t. Additive over rows: the loss of a batch is the sum
    of those of its parts with the same factors.

    Shapes: `logps` (B, T); `advantages` (B,) or (B, T); returns a scalar. Units: nats. Source: TRL 1.16.
    """
    advantages = advantages.unsqueeze(1) if advantages.ndim == 1 else advantages
    keep, mask = batch.mask.bool(), batch.mask.to(logps.dtype)
    # before any exp: what a pad or a tool's token holds could overflow, and its gradient would be 0 * inf
    logps, old_logps, ref_logps = (
        None if tensor is None else tensor.masked_fill(~keep, 0.0)
        for tensor in (logps, batch.old_logps, batch.ref_logps)
    )
    log_ratio = logps - (logps.detach() if old_logps is None else old_logps)
    log_weight = log_ratio
    if surrogate.importance_sampling_level == "sequence":
        log_weight = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1.0)
    ratio = log_weight.exp()

    losses = _token_losses(logps, advantages, mask, log_ratio, ratio, batch.sampling_ratio, surrogate)
    if batch.sampling_ratio is not None and surrogate.loss_type != "vespo":  # vespo has it in its weight
        losses = losses * batch.sampling_ratio
    if surrogate.beta != 0.0:
        losses = losses + surrogate.beta * _kl(logps, ref_logps, ratio, surrogate)
    losses = losses.masked_fill(~keep, 0.0)  # not a product: nan * 0 is nan
    return (losses.sum(1) * batch.factors).sum()


def _token_losses(logps, advantages, mask, log_ratio, ratio, sampling_ratio, surrogate) -> torch.Tensor:
    kind = surrogate.loss_type
    if kind == "cispo":
        return -ratio.clamp(max=surrogate.epsilon_high).detach() * advantages * logps
    if kind == "sapo":
        temperature = torch.where(advantages > 0, *surrogate.sapo_temperatures).to(ratio.dtype)
        return -torch.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature * advantages
    if kind == "vespo":
        return -_gamma_weight(log_ratio, advantages, mask, sampling_ratio, surrogate) * advantages * logps
    clipped = ratio.clamp(1.0 - surrogate.epsilon_low, 1.0 + surrogate.epsilon_high)
    if surrogate.delta is not None:
        ratio = ratio.clamp(max=surrogate.delta)
    return -torch.min(ratio * advantages, clipped * advantages)


@torch.no_grad()
def _gamma_weight(log_ratio, advantages, mask, sampling_ratio, surrogate) -> torch.Tensor:
    """VESPO's weight of a sequence, e^lambda w^k e^(-lambda w) with w the product of its ratios; 1 at w = 1."""
    lowest = math.log(1e-8)
    log_w = (log_ratio.clamp(-20.0, 20.0) * mask).sum(1, keepdim=True)
    if sampling_ratio is not None:
        log_w = log_w + sampling_ratio.log().clamp(lowest, 20.0).sum(1, keepdim=True)
    log_w = log_w.clamp(lowest, 20.0)
    k = torch.where(advantages >= 0, *surrogate.vespo_k).to(log_w.dtype)
    rate = torch.where(advantages >= 0, *surrogate.vespo_lambda).to(log_w.dtype).clamp(min=1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _kl(logps, ref_logps, ratio, surrogate) -> torch.Tensor:
    """KL(policy || reference) by the k3 estimate; times the ratio with `use_bias_correction_kl`."""
    difference = ref_logps - logps
    kl = difference.exp() - difference - 1.0
    return kl * ratio if surrogate.use_bias_correction_kl else kl


def check_finite(logps: torch.Tensor, mask: torch.Tensor, step: int, rows: torch.Tensor | None = None) -> None:
    """Refuse nan and inf among the log-probs that count.

    Shapes: `logps`, `mask` (B, T); `rows` (B,), the rows' numbers in the micro-batch, if these are not all of them.
    Raises: ValueError, with step, row and token.
    """
    bad = ~torch.isfinite(logps) & mask.bool()
    if bad.any():
        row, token = bad.nonzero()[0].tolist()
        number = row if rows is None else rows[row].item()
        raise ValueError(
            f"Step {step}: the LM head gives a log-prob of {logps[row, token].item()} at row {number} of the "
            f"micro-batch, token {token}. The model has diverged, or its dtype overflows: lower the learning rate, or "
            "use bfloat16 or float32 instead of float16 (cast_lm_head_to_fp32=True for the head alone)."
        )


# ---------------------------------------------------------------------- the fused twin


class FusedLoss:
    """A fused loss to be taken in the model's forward (see `add_fused_loss`), and what came of it.

    Not a dataclass: FSDP rebuilds those among a forward's arguments, with their tensors cast.

    Attributes:
        completion_ids: (B, T), the sampled tokens.
        batch, surrogate: see `clipped_surrogate`.
        credit: student log-probs (n, T) and row numbers (n,) of a chunk -> token advantages (n, T).
        temperature: what logits are divided by.
        float32_head: run the head in float32, outside autocast.
        with_entropy: also fill `entropy`, for the metric: one more pass over the head.
        loss: afterwards, the scalar, with gradient.
        logps, entropy: afterwards, (B, T) in nats, without gradient.
    """

    def __init__(
        self,
        completion_ids: torch.Tensor,
        batch: SurrogateBatch,
        surrogate: Surrogate,
        credit: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        temperature: float = 1.0,
        float32_head: bool = False,
        with_entropy: bool = True,
    ):
        self.completion_ids = completion_ids
        self.batch = batch
        self.surrogate = surrogate
        self.credit = credit
        self.temperature = temperature
        self.float32_head = float32_head
        self.with_entropy = with_entropy
        self.loss: torch.Tensor | None = None
        self.logps: torch.Tensor | None = None
        self.entropy: torch.Tensor | None = None

    @classmethod
    def from_config(cls, config: GRPOConfig, batch: Mapping[str, torch.Tensor], *loss_args, ratio=None) -> FusedLoss:
        """Of a trainer's micro-batch; `loss_args` are `mask`, `factors` and `credit`, `ratio` the `sampling_ratio`."""
        mask, factors, credit = loss_args
        old_logps, ref_logps = batch.get("old_per_token_logps"), batch.get("ref_per_token_logps")
        return cls(
            batch["completion_ids"],
            SurrogateBatch(mask, factors, old_logps, ref_logps, ratio),
            Surrogate.from_config(config),
            credit,
            config.temperature,
            config.cast_lm_head_to_fp32,
        )

    def ppo_loss_fn(self, *, per_token_logps, advantages, **liger_kwargs):
        """Called by Liger's base for every chunk. The slot for advantages holds the rows' numbers: all else that
        belongs to a row is looked up by them, whatever its shape."""
        rows = advantages
        credited = self.credit(per_token_logps.detach(), rows)
        loss = clipped_surrogate(per_token_logps, credited, self.batch.rows(rows), self.surrogate)
        return loss, (per_token_logps,)

    @torch.compiler.disable  # Liger 0.8.5 marks dimensions as dynamic, which cannot be traced
    def take(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float = 1.0) -> None:
        """Fill `loss`, `logps` and `entropy`.

        Shapes: `hidden` (B, T, H), the states that predict the completion's tokens; `weight` (V, H); `bias` (V,);
        `scale` multiplies the logits, see `logit_scale`. Raises: ValueError, where the shapes do not fit.
        """
        ids = self.completion_ids
        if hidden.shape[:2] != ids.shape or hidden.size(2) != weight.size(1):
            raise ValueError(
                f"hidden states {tuple(hidden.shape)} and a head {tuple(weight.shape)} do not fit completions "
                f"{tuple(ids.shape)}."
            )
        hidden = hidden.float() if self.float32_head else hidden
        # pads may hold anything, and 0 * nan would reach the gradient of the head
        hidden = hidden.masked_fill(~self.batch.mask.bool().unsqueeze(2), 0.0)
        temperature = self.temperature / scale
        chunk = max(1, _CHUNK_TOKENS // max(1, hidden.size(1)))
        no_autocast = torch.autocast(hidden.device.type, enabled=False) if self.float32_head else nullcontext()
        with no_autocast:
            self.loss, self.logps = _liger_function()(hidden, weight, bias, self, temperature, chunk)
            if self.with_entropy:  # Liger's base keeps no more of a tile than its log-sum-exp
                flat = hidden.reshape(-1, hidden.size(2))
                self.entropy = entropies(flat, weight, bias, ids.reshape(-1), temperature).view(ids.shape)


@functools.cache
def _liger_function() -> Callable:
    """The autograd function, made on first use: liger-kernel is an extra."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    class LigerFusedLinearRLSDFunction(LigerFusedLinearPPOBase):
        @staticmethod
        def forward(ctx, hidden, weight, bias, fused, temperature, chunk_size):
            loss, (logps,) = LigerFusedLinearPPOBase.forward(
                cls=fused,
                ctx=ctx,
                _input=hidden,
                weight=weight,
                selected_token_ids=fused.completion_ids,
                attention_mask=fused.batch.mask,
                advantages=torch.arange(hidden.size(0), device=hidden.device),
                bias=bias,
                temperature=temperature,
                compiled=False,  # the chunk's loss calls back into Python and raises on nan
                use_ref_model=False,
                chunk_size=chunk_size,
            )
            ctx.mark_non_differentiable(logps)
            return loss, logps

        @staticmethod
        def backward(ctx, grad_loss, grad_logps):
            grads = LigerFusedLinearPPOBase.backward(ctx, grad_loss)
            return grads[0], grads[1], grads[5], None, None, None

    return LigerFusedLinearRLSDFunction.apply


@torch.no_grad()
def entropies(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Entropies (N,) in nats of the distributions over the vocabulary, by TRL's tiled head, for the metric alone."""
    outputs = ChunkedLogProbFunction.apply(
        hidden, weight, bias, ids, temperature, _VOCABULARY_TILE, None, 1.0, ("entropy",)
    )
    return outputs[1]


@dataclass
class FusedOutput(ModelOutput):
    """What TRL reads off a fused forward. Shapes: all (B, L - 1) but the scalar loss."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def logit_scale(config: Any) -> float:
    """What the model's own forward multiplies its logits with, 1 for most.

    Source: transformers 5.23, the forward of Cohere (`logit_scale`), Granite (`logits_scaling`, a divisor), Falcon-H1
    (`lm_head_multiplier`). Raises: ValueError for what the fused loss cannot reproduce.
    """
    for name in ("final_logit_softcapping", "output_multiplier"):
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"use_liger_loss=True, but the model's config has {name}={getattr(config, name)}, which Liger's "
                "chunked base does not apply to the logits. Leave use_liger_loss=False: TRL's fused head does."
            )
    if getattr(config, "logits_scaling", None) is not None:
        return config.logits_scaling if config.model_type == "hyperclovax" else 1.0 / config.logits_scaling
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return 1.0


def add_fused_loss(model: PreTrainedModel, gathered: Callable[..., Any]) -> None:
    """Let `model(..., fused_loss=FusedLoss)` take the fused loss in its forward, where the weights are ready under DDP
    and FSDP too; without that argument the forward is as it was.

    Args:
        model: a causal language model, not wrapped by PEFT (adapters act from within). Its head is looked up on each
            call.
        gathered: weight, bias -> a context in which both are whole (ZeRO-3 shards them).

    Raises: ValueError, see `logit_scale`.
    """
    original = model.forward
    scale = logit_scale(model.config.get_text_config())

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, fused_loss: FusedLoss | None = None, **kwargs):
        if fused_loss is None:
            return original(*args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if name not in ("fused_lm_head", "labels")}
        states = self.base_model(*args, **{**inputs, "use_cache": False}).last_hidden_state
        head, tokens = self.get_output_embeddings(), fused_loss.completion_ids.size(1)
        weight, bias = head.weight, head.bias
        if hasattr(weight, "full_tensor"):  # FSDP2's shards
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        with gathered(weight, bias):
            fused_loss.take(states[:, -tokens - 1 : -1].to(weight.device), weight, bias, scale)
        left = states.size(1) - 1 - tokens  # TRL keeps the last T columns
        logps, entropy = (
            None if tensor is None else torch.nn.functional.pad(tensor, (left, 0))
            for tensor in (fused_loss.logps, fused_loss.entropy)
        )
        return FusedOutput(loss=fused_loss.loss, log_probs=logps, entropy=entropy)

    model.forward = types.MethodType(forward, model)


def fused_forward(model: torch.nn.Module, fused_loss: FusedLoss) -> Callable[..., FusedOutput]:
    """The forward of a model that has been through `add_fused_loss`, wrapped or not, with that loss in it.

    The loss is taken from what the outermost wrapper returns: DDP, FSDP and Accelerate hang their hooks on that.
    """

    def forward(*args, **kwargs) -> FusedOutput:
        output = model(*args, **kwargs, fused_loss=fused_loss)
        fused_loss.loss = output.loss
        return output

    return forward
