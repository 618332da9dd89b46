"""Passes on the torch module and on the ONNX graph, one file each, under the contract of base.py."""
