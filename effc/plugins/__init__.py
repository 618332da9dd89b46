"""effc's attention operators: pattern definition, reference, torch hook, ONNX function body, native library."""
