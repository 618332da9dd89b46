"""The readable truth of every attention form: plain torch, any float dtype.

Every lowering (ONNX function body, CPU kernel, CUDA kernel) is tested against these functions in float64.
"""

from effc.plugins.reference import chunked as chunked
from effc.plugins.reference import dense_chunked as dense_chunked
from effc.plugins.reference import dynamic as dynamic
from effc.plugins.reference import hedgehog as hedgehog
from effc.plugins.reference import hierarchical as hierarchical
from effc.plugins.reference import linear as linear
from effc.plugins.reference import linformer as linformer
from effc.plugins.reference import nystrom as nystrom
from effc.plugins.reference import performer as performer
from effc.plugins.reference import softmax as softmax
from effc.plugins.reference import topk as topk
from effc.plugins.reference import topk_blocks as topk_blocks
from effc.plugins.reference.dispatch import attend as attend
from effc.plugins.reference.dispatch import initial_parameters as initial_parameters
