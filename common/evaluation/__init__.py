"""The evaluator, its engines (torch, ONNX Runtime, OM), metrics and single-image prediction."""
