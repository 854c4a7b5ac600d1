"""ONNX files as models: read, run on torch's layers, captured, and verified in ONNX Runtime."""

from tersenet.onnx_import.open import open_onnx

__all__ = ["open_onnx"]
