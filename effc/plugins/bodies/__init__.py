"""The ONNX function bodies of effc's operators: standard operators only, so that a model runs anywhere."""

from effc.plugins.bodies import position as position
from effc.plugins.bodies.dispatch import OPSET as OPSET
from effc.plugins.bodies.dispatch import body_text as body_text
