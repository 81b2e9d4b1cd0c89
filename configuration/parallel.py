"""How a model is spread over devices, as transformers reads it: module or parameter -> style of its shards."""

DENSE = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
WHOLE_PROJECTIONS = {
    "layers.*.self_attn.q_proj": "colwise_gather_output",
    "layers.*.self_attn.k_proj": "colwise_gather_output",
    "layers.*.self_attn.v_proj": "colwise_gather_output",
    "layers.*.self_attn.o_proj": "rowwise_split_input",
}
"""As in OLMoE, whose norms need all of a token's query and key."""

EXPERTS_TP = {
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}
EXPERTS_EP = {
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "ep_dispatch_experts",
}


def tensor_parallel_plan(*, packed_experts: bool, norm_over_projection: bool) -> dict[str, str]:
    """The plan of Qwen3-MoE, or of OLMoE with `norm_over_projection`; a shared expert stays whole on every rank, as in theirs."""
    plan = dict(DENSE) | (EXPERTS_TP if packed_experts else {})
    if norm_over_projection:
        plan = {name: style for name, style in plan.items() if not name.endswith("_norm")} | WHOLE_PROJECTIONS
    return plan
