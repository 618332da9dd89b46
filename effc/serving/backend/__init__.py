"""What runs inside a Triton server, copied into the model repository together with the modules of effc that it imports.

A server has numpy, onnxruntime and tokenizers, and nothing else may be imported here, pydantic included. Modules named
``*_model`` speak to Triton; the others know nothing of it and are tested without it.
"""
