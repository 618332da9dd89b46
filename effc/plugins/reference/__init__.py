"""The readable truth of every attention form: plain torch, any float dtype.

Every lowering (ONNX function body, CPU kernel, CUDA kernel) is tested against these functions in float64.
"""

from effc.plugins.reference import softmax as softmax
from effc.plugins.reference.dispatch import attend as attend
from effc.plugins.reference.dispatch import initial_parameters as initial_parameters
