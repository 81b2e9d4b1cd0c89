"""Compiled decoding.

On a GPU a step is recorded and replayed as a whole (CUDA graphs), as transformers does it. On a CPU a decoding step of one row
reads every weight once, so it should take as long as reading them takes. The libraries behind `torch.nn.functional.linear` are
far from that with a single row (in bfloat16 more than in float32); the loop that inductor writes for a product and a sum is not.
`OneRowProducts` puts the one in the place of the other.
"""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from transformers import CompileConfig

CACHE_STEP = 256
"""Lengths of caches are multiples of this."""

_aten = torch.ops.aten


class OneRowProducts(CustomGraphPass):
    """A pass over inductor's graphs: products of one row with a matrix `[out, in]`, on a CPU, become sums over its rows."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for target, bias in ((_aten.mm.default, False), (_aten.addmm.default, True)):
            for node in graph.find_nodes(op="call_function", target=target):
                row, matrix = node.args[-2:]
                if not node.kwargs and self._applies(row.meta["val"], matrix.meta["val"]):
                    self._replace(graph, node, row, matrix, node.args[0] if bias else None)

    @staticmethod
    def _applies(row: torch.Tensor, matrix: torch.Tensor) -> bool:
        return row.device.type == "cpu" and row.shape[0] == 1 and row.is_floating_point() and matrix.stride(0) == 1

    @staticmethod
    def _replace(graph: torch.fx.Graph, node: torch.fx.Node, row, matrix, bias) -> None:
        with graph.inserting_before(node):
            rows = graph.call_function(_aten.permute.default, (matrix, [1, 0]))
            # Of a tensor with strides of its own every element is computed once, and not for every row of the matrix.
            size = row.meta["val"].shape[1]
            row = graph.call_function(_aten.as_strided.default, (row, [1, size], [size, 1], 0))
            products = graph.call_function(_aten.mul.Tensor, (rows, row))
            result = graph.call_function(_aten.sum.dim_IntList, (products, [1]))
            result = graph.call_function(_aten.unsqueeze.default, (result, 0))
            if bias is not None:
                result = graph.call_function(_aten.add.Tensor, (result, bias))
        result.meta.update(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))

    def __eq__(self, other) -> bool:
        # CompileConfigs are compared: an equal one does not compile again.
        return type(other) is type(self)

    __hash__ = None


def compiled_decoding(tokens: int, device: str | torch.device = "cpu", **options) -> dict[str, Any]:
    """Arguments of `generate()` with which decoding is compiled, by the fastest way known for the device.

    The first token takes minutes; a later call with the same batch size and length of the cache does not compile again.

    Args:
        tokens: of prompt and answer together, at most; rounded up, so that calls share a length.
        device: of the model.
        options: further ones of `torch.compile(options=...)`, for a CPU.

    Returns:
        `cache_implementation`, `max_cache_len` and `compile_config`.
    """
    if torch.device(device).type == "cpu":
        passes = {"post_grad_custom_pre_pass": OneRowProducts()}
        config = CompileConfig(fullgraph=True, dynamic=False, mode=None, options={**passes, **options})
        # transformers compiles on accelerators alone unless this is set.
        config._compile_all_devices = True
    else:
        config = CompileConfig(fullgraph=True, dynamic=False)
    length = -(-tokens // CACHE_STEP) * CACHE_STEP
    return {"cache_implementation": "static", "max_cache_len": length, "compile_config": config}
