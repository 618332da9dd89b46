"""The ONNX function bodies of effc's operators: standard operators only, so that a model runs anywhere."""

from effc.plugins.bodies import chunked as chunked
from effc.plugins.bodies import dense_chunked as dense_chunked
from effc.plugins.bodies import dynamic as dynamic
from effc.plugins.bodies import hierarchical as hierarchical
from effc.plugins.bodies import linear as linear
from effc.plugins.bodies import linformer as linformer
from effc.plugins.bodies import nystrom as nystrom
from effc.plugins.bodies import position as position
from effc.plugins.bodies import topk as topk
from effc.plugins.bodies import topk_blocks as topk_blocks
from effc.plugins.bodies.dispatch import OPSET as OPSET
from effc.plugins.bodies.dispatch import body_text as body_text
