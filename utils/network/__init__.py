"""What is certified: models and checkpoints, and how they, any module and ONNX files become graphs."""

from .checkpoint import CONFIG_KEYS, CheckpointError, build_model, load_checkpoint, save_checkpoint
from .cnn import CNN_KINDS, ImageClassifier, make_cnn
from .models import MLP, SequenceClassifier
from .onnx_export import export_onnx
from .onnx_graph import OnnxNetwork, import_onnx, read_onnx
from .reading import Network, check_network, graph_of, num_classes, output_shape, read_network
from .speech import MelFeatures, SpeechClassifier
from .symbolic import UnsupportedError
from .trace import TracedModule
from .unroll import Cell, unroll

__all__ = [
    "CNN_KINDS",
    "CONFIG_KEYS",
    "MLP",
    "Cell",
    "CheckpointError",
    "ImageClassifier",
    "MelFeatures",
    "Network",
    "OnnxNetwork",
    "SequenceClassifier",
    "SpeechClassifier",
    "TracedModule",
    "UnsupportedError",
    "build_model",
    "check_network",
    "export_onnx",
    "graph_of",
    "import_onnx",
    "load_checkpoint",
    "make_cnn",
    "num_classes",
    "output_shape",
    "read_network",
    "read_onnx",
    "save_checkpoint",
    "unroll",
]
