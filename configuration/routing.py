"""Settings of a mixture of experts that no engine reads: domains, scoring, how many experts a token gets, loss ratios.

Sparse layers are grouped into stages; in each stage the experts belong to named domains. `DEFAULT_TOPOLOGY` is used where
`routing` is given without a topology and without `num_experts`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

DEFAULT_TOPOLOGY = (
    {"text": 3, "code": 2, "image": 3},
    {"text_syntactic": 4, "text_semantic": 4},
    {"multimodal_fusion": 8},
    {"output_refinement": 8},
)


@strict
@dataclass
class ExpertRouting:
    """How the sparse layers choose their experts.

    Attributes:
        expert_topology: one mapping domain -> number of experts per stage. Sparse layer number k of K belongs to stage
            floor(k S / K) of S. The experts are numbered in the alphabetical order of their domains, since that is how a
            configuration file is written. None = one domain with `num_experts` experts.
        router_scoring: `"linear"`, a product with one vector per expert, or `"attention"`, the attention of several router
            heads over learned keys of the experts.
        router_heads, router_head_dim: of attention scoring.
        min_experts_per_tok: so many experts are always active; None = `num_experts_per_tok`.
        expert_activation_threshold: a further expert, up to `num_experts_per_tok`, is active while its probability is at
            least this; each layer keeps it as a buffer, which training may move.
        bias_balancing: each layer keeps a bias per expert as a buffer, which training may move against an uneven load
            (https://arxiv.org/abs/2408.15664). It changes which experts a token gets, never their weights.
        target_experts_per_tok: mean number of active experts towards which training moves the thresholds.
        expert_rank: None = experts with matrices of their own; r = one shared MLP and a delta of rank r per expert.
        domain_weights: domain -> weight of each of its experts in the balance loss's target distribution; default 1.
        router_z_loss_ratio, expert_cost_ratio: weight of the router z-loss (https://arxiv.org/abs/2202.08906) and of the mean
            number of active experts relative to the balance loss.
        num_modalities: rows of the domain gate's table of modality biases, one per value of `mm_token_type_ids`; 0 = no table.
    """

    expert_topology: list | None = None
    router_scoring: Literal["linear", "attention"] = "linear"
    router_heads: int = 4
    router_head_dim: int = 32
    min_experts_per_tok: int | None = None
    expert_activation_threshold: float | int = 0.0
    target_experts_per_tok: float | int | None = None
    bias_balancing: bool = False
    expert_rank: int | None = None
    domain_weights: dict | None = None
    router_z_loss_ratio: float | int = 0.0
    expert_cost_ratio: float | int = 0.0
    num_modalities: int = 0

    def validate_topology(self):
        for stage in self.expert_topology if self.expert_topology is not None else [{"": 1}]:
            counts = list(stage.values()) if isinstance(stage, dict) else []
            if not counts or not all(isinstance(count, int) and count >= 1 for count in counts):
                raise ValueError(
                    f"routing['expert_topology'] has the stage {stage!r}; each stage must map at least one domain to its number"
                    " of experts, e.g. {'text': 6, 'code': 2}"
                )
        if self.expert_topology is not None and not self.expert_topology:
            raise ValueError("routing['expert_topology']=[] must have at least one stage; None = one domain")
        known = {domain for stage in self.expert_topology or () for domain in stage}
        for domain, weight in (self.domain_weights or {}).items():
            if domain not in known or not isinstance(weight, (int, float)) or weight <= 0:
                raise ValueError(
                    f"routing['domain_weights'] has {domain!r}: {weight!r}; the keys must be domains of expert_topology"
                    f" ({sorted(known)}) and the weights positive"
                )

    def validate_numbers(self):
        for name in ("router_heads", "router_head_dim", "min_experts_per_tok", "expert_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"routing[{name!r}]={value} must be at least 1")
        for name in ("router_z_loss_ratio", "expert_cost_ratio", "num_modalities"):
            if getattr(self, name) < 0:
                raise ValueError(f"routing[{name!r}]={getattr(self, name)} must be 0 or more")
        if not 0 <= self.expert_activation_threshold <= 1:
            raise ValueError(
                f"routing['expert_activation_threshold']={self.expert_activation_threshold} is compared with probabilities and"
                " must lie in [0, 1]"
            )

    def stage(self, number: int, total: int) -> dict[str, int] | None:
        """Domain -> number of experts of sparse layer `number` of `total`; None = one domain."""
        if self.expert_topology is None:
            return None
        return self.expert_topology[number * len(self.expert_topology) // total]


def complete_routing(value: Mapping[str, Any] | None, where: str, *, has_experts: bool) -> dict[str, Any] | None:
    """The checked dictionary with all its fields.

    Args:
        where: what the message of an error begins with.
        has_experts: whether the number of experts is known without a topology.

    Raises:
        ValueError: not a dictionary, or an unknown field. What is in the fields is checked by `ExpertRouting`.
    """
    if value is None:
        return None
    known = ExpertRouting.__dataclass_fields__
    if not isinstance(value, dict) or set(value) - set(known):
        raise ValueError(f"{where}routing={value!r} must be a dictionary with keys among {sorted(known)}")
    fields = dict(value)
    if fields.get("expert_topology") is None and not has_experts:
        fields["expert_topology"] = [dict(stage) for stage in DEFAULT_TOPOLOGY]
    fields = asdict(ExpertRouting(**fields))
    if fields["expert_topology"] is not None:
        fields["expert_topology"] = [dict(sorted(stage.items())) for stage in fields["expert_topology"]]
    return fields


def validate_sparse_layer(where: str, layer, routing: ExpertRouting) -> None:
    """Checks the fields of one sparse layer against each other.

    Args:
        layer: configuration of the layer.

    Raises:
        ValueError: the message names the field, its value and what would be valid.
    """
    experts, most, least = layer.num_experts or 0, layer.num_experts_per_tok, routing.min_experts_per_tok
    if not 1 <= most <= experts:
        raise ValueError(f"{where}num_experts_per_tok={most} must lie between 1 and num_experts={experts}")
    least = most if least is None else least
    if least > most:
        raise ValueError(f"{where}routing['min_experts_per_tok']={least} must be at most num_experts_per_tok={most}")
    target = routing.target_experts_per_tok
    if target is not None and not (least < most and least <= target <= most):
        raise ValueError(
            f"{where}routing['target_experts_per_tok']={target} must lie between min_experts_per_tok={least} and"
            f" num_experts_per_tok={most}, which must differ"
        )
    if layer.moe_intermediate_size < 1:
        raise ValueError(f"{where}moe_intermediate_size={layer.moe_intermediate_size} must be at least 1")
    shared = layer.shared_expert_intermediate_size
    if shared is not None and shared < 1:
        raise ValueError(f"{where}shared_expert_intermediate_size={shared} must be at least 1; None = no shared expert")
    if routing.expert_rank is None and layer.mlp_bias:
        raise ValueError(f"{where}mlp_bias=True, but experts have no biases; low-rank experts (routing['expert_rank']) may")
    if routing.expert_rank is not None and not layer.norm_topk_prob:
        raise ValueError(
            f"{where}routing['expert_rank']={routing.expert_rank} needs norm_topk_prob=True: low-rank experts share one MLP, whose"
            " weights must sum to one"
        )
