"""torchair: a backend of torch.compile. FAKE_NPU_TORCHAIR=broken fails when asked for it, =refuses when it compiles."""

import os

from torch_npu._calls import note


class CompilerConfig:
    """Options; the defaults are used."""


def get_npu_backend(*, compiler_config=None, custom_decompositions=None):
    fault = os.environ.get("FAKE_NPU_TORCHAIR")
    if fault == "broken":
        raise ImportError("libgraph.so: cannot open shared object file: No such file or directory")

    def compile_graph(graph, example_inputs):
        if fault == "refuses":
            raise RuntimeError(
                "EZ9999: Inner Error!\nEZ9999: [PID: 7] 2026-01-01-00:00:00.000.000 no such kernel[FUNC:f]"
            )
        note("torchair", *(tuple(each.shape) for each in example_inputs if getattr(each, "ndim", 0) == 4))
        return graph

    return compile_graph
